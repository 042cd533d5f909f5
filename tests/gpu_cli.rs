//! The program on a GPU: the same commands, the same words.

use serde_json::Value;
use strand_kernels::gpu::Gpu;

use crate::binary::{piped, strand};
use crate::gpu::devices;
use crate::http::Server;

/// Of this size everywhere, so that the emulator has little to clear.
const SMALL: [&str; 6] = ["--kv-memory", "4MiB", "--max-model-len", "512", "--max-num-seqs", "4"];

fn on<'a>(device: &'a str, command: &[&'a str]) -> Vec<&'a str> {
    [command, &SMALL, &["--device", device]].concat()
}

#[test]
fn gpu_chat_answers_from_files_that_are_switched_off_and_on() {
    for device in devices() {
        let device = device.to_string();
        let folder = crate::binary::scratch("gpu-chat");
        let file = folder.join("config.py");
        std::fs::write(&file, "MAX_RETRIES = 47\n").expect("it can be written");
        let script = format!(
            "/load {}\nWhat is MAX_RETRIES?\n/deactivate config.py\nWhat is MAX_RETRIES?\n\
             /unload config.py\n/restore config.py\nWhat is MAX_RETRIES?\n",
            file.display()
        );

        let here = piped(&on("cpu", &["chat", "--temperature", "0"]), &script);
        let there = piped(&on(&device, &["chat", "--temperature", "0"]), &script);
        let answers = |out: &str| -> Vec<String> {
            out.lines().filter(|line| line.ends_with('.')).map(str::to_owned).collect()
        };
        assert_eq!((there.status, there.err.as_str()), (0, ""), "{there:?}");
        assert_eq!(answers(&there.out), answers(&here.out));
        assert_eq!(there.out.matches("47").count(), 2, "{}", there.out);
    }
}

#[test]
fn gpu_generate_tells_where_it_computed_and_its_log_probabilities() {
    for device in devices() {
        let device = device.to_string();
        let command = ["generate", "-p", "The capital", "--max-tokens", "4", "--temperature", "0"];
        let more = ["--json", "--logprobs", "2", "--prompt-logprobs", "2", "-v"];
        let there = strand(&on(&device, &[&command[..], &more].concat()));
        let here = strand(&on("cpu", &[&command[..], &more].concat()));
        assert_eq!(there.status, 0, "{there:?}");
        assert!(there.err.contains(&format!(": {device}, weights bf16, kv bf16")), "{}", there.err);
        let (there, here) = (&there.json()[0], &here.json()[0]);
        assert_eq!(there["token_ids"], here["token_ids"]);
        for key in ["logprobs", "prompt_logprobs"] {
            let count = |value: &Value| value[key].as_array().map(Vec::len);
            assert_eq!(count(there), count(here));
        }
        let first = |value: &Value| value["logprobs"][0]["logprob"].as_f64().expect("a number");
        assert!((first(there) - first(here)).abs() < 0.1);
    }
}

#[test]
fn gpu_bench_throughput_runs_its_requests() {
    for device in devices() {
        let device = device.to_string();
        let sizes = ["--num-seqs", "3", "--min-input-len", "5", "--max-input-len", "20"];
        let answers = ["--min-output-len", "2", "--max-output-len", "6"];
        let command = [&["bench", "throughput"][..], &sizes, &answers].concat();
        let run = strand(&on(&device, &command));
        assert_eq!(run.status, 0, "{run:?}");
        let last = run.out.lines().last().expect("it says something");
        let report: Value = serde_json::from_str(last).expect("it ends with JSON");
        assert_eq!(report["device"], device.as_str());
    }
}

/// A program with CUDA in it, on a machine without.
#[test]
fn gpu_that_is_not_there_is_refused_by_name_and_auto_says_that_it_takes_the_cpu() {
    if !cfg!(feature = "cuda") || Gpu::cuda(0).is_ok() {
        eprintln!("skipped: built without CUDA, or there is a GPU");
        return;
    }
    let generate = ["generate", "-p", "x", "--max-tokens", "1"];
    let bench = ["bench", "throughput", "--num-seqs", "1"];
    for command in [&generate[..], &["chat"], &["serve", "--addr", "127.0.0.1:0"], &bench] {
        let there = piped(&on("cuda", command), "");
        there.refused(1, "opening CUDA device 0");
        assert!(there.err.contains("use the cpu"), "{}", there.err);
    }
    strand(&["bench", "kernels", "--device", "cuda"]).refused(1, "opening CUDA device 0");
    for command in [&generate[..], &["chat"]] {
        let here = piped(&on("auto", command), "");
        assert_eq!(here.status, 0, "{here:?}");
        assert!(here.err.contains("computing on the CPU: opening CUDA device 0"), "{}", here.err);
    }
    let server = Server::start(&[&SMALL[..], &["--device", "auto"]].concat());
    assert!(server.log().contains("computing on the CPU"), "{}", server.log());
}
