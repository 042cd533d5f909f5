//! Compiles `cuda/*.cu`, only where a feature asks for it: with nvcc for devices, with the C++
//! compiler for the emulator. Without features it does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Machine code for Ampere and Hopper, and PTX for what comes later.
const ARCHITECTURES: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    let sources = sources(Path::new("cuda"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        println!("cargo::rerun-if-env-changed=NVCC");
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        fatbins(&sources);
    }
    if env::var_os("CARGO_FEATURE_CUDA_EMULATOR").is_some() {
        println!("cargo::rerun-if-env-changed=CXX");
        emulator(&sources);
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the kernels' folder can be listed");
    let paths = entries.map(|entry| entry.expect("the kernels' folder can be listed").path());
    let mut found: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "cu")).collect();
    found.sort();
    found
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("kernels have plain names")
}

fn out(name: &str) -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder for output")).join(name)
}

fn fatbins(sources: &[PathBuf]) {
    let nvcc = env::var("NVCC").unwrap_or_else(|_| match env::var("CUDA_HOME") {
        Ok(home) => format!("{home}/bin/nvcc"),
        Err(_) => "nvcc".to_string(),
    });
    let commands = sources.iter().map(|source| {
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"]);
        command.args(ARCHITECTURES.iter().flat_map(|architecture| ["-gencode", architecture]));
        command.arg("-o").arg(out(&format!("{}.fatbin", stem(source)))).arg(source);
        command
    });
    run_all(commands.collect(), "CUDA 13.0's nvcc (kernels/cuda/root.sh installs it)");
    let images: String = sources
        .iter()
        .map(|source| {
            let path = out(&format!("{}.fatbin", stem(source)));
            format!("    include_bytes!({path:?}),\n")
        })
        .collect();
    let text =
        format!("/// The machine code of `cuda/*.cu`.\nconst FATBINS: &[&[u8]] = &[\n{images}];\n");
    fs::write(out("fatbins.rs"), text).expect("the output folder can be written");
}

fn emulator(sources: &[PathBuf]) {
    let names: Vec<&str> = sources.iter().map(|source| stem(source)).collect();
    let declared: String = names
        .iter()
        .map(|name| format!("extern \"C\" const emulator::Entry strand_kernels_{name}[];\n"))
        .collect();
    let listed: String = names.iter().map(|name| format!("strand_kernels_{name}, ")).collect();
    let text = format!(
        "#include \"emulator.h\"\n{declared}extern const emulator::Entry* const \
         strand_emulator_kernels[];\nconst emulator::Entry* const strand_emulator_kernels[] = \
         {{{listed}nullptr}};\n"
    );
    let table = out("table.cpp");
    fs::write(&table, text).expect("the output folder can be written");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    let mut objects = Vec::new();
    let mut commands = Vec::new();
    let own = [PathBuf::from("cuda/emulator/emulator.cpp"), table];
    for source in sources.iter().chain(&own) {
        let object = out(&format!("{}.o", stem(source)));
        let mut command = Command::new(&compiler);
        // No contraction: what is computed must not depend on the compiler's mood.
        command.args(["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]);
        command.args(["-Wno-unknown-pragmas", "-Icuda", "-Icuda/emulator", "-x", "c++", "-c"]);
        command.arg(source).arg("-o").arg(&object);
        commands.push(command);
        objects.push(object);
    }
    run_all(commands, "a C++ compiler");
    let library = out("libstrand_emulator.a");
    drop(fs::remove_file(&library));
    let mut archive = Command::new("ar");
    archive.arg("crs").arg(&library).args(&objects);
    run_all(vec![archive], "ar");
    println!("cargo::rustc-link-search=native={}", out("").display());
    println!("cargo::rustc-link-lib=static=strand_emulator");
    println!("cargo::rustc-link-lib=dylib=stdc++");
}

/// Runs commands, as many at a time as there are processors.
fn run_all(commands: Vec<Command>, program: &str) {
    let width = thread::available_parallelism().map_or(1, usize::from);
    let queue = std::sync::Mutex::new(commands.into_iter());
    let next = || queue.lock().expect("nobody panics with the lock held").next();
    thread::scope(|scope| {
        for _ in 0..width {
            scope.spawn(|| {
                while let Some(mut command) = next() {
                    match command.status() {
                        Ok(status) => assert!(status.success(), "{command:?}: {status}"),
                        Err(error) => panic!("{command:?}: {error}; it needs {program}"),
                    }
                }
            });
        }
    });
}
