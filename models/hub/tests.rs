//! Against a hub of our own on the loopback interface, which speaks as much of the protocol as the
//! client asks for.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strand-hub-{name}-{}", std::process::id()));
        let _left_by_a_killed_run = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// A cached model, laid out as the hub's own tools do.
    fn add_model(&self, id: &str, files: &[(&str, &str)]) -> PathBuf {
        let model = self.0.join(format!("models--{}", id.replace('/', "--")));
        let snapshot = model.join("snapshots").join(COMMIT);
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::create_dir_all(model.join("blobs")).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(model.join("refs/main"), COMMIT).unwrap();
        for (name, content) in files {
            std::fs::write(model.join("blobs").join(name), content).unwrap();
            let blob = Path::new("../../blobs").join(name);
            std::os::unix::fs::symlink(blob, snapshot.join(name)).unwrap();
        }
        snapshot
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Serves `org/model` with the given files to whoever has the token, until the process ends;
/// reports each request as "METHOD path token".
fn serve(files: Vec<(&'static str, String)>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (log, requests) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (request, token) = answer(stream.unwrap(), &files);
            if log.send(format!("{request} {token}")).is_err() {
                return;
            }
        }
    });
    (address, requests)
}

fn answer(mut stream: TcpStream, files: &[(&str, String)]) -> (String, String) {
    let (mut request, mut token) = (String::new(), "-".to_string());
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let line = line.unwrap();
        if request.is_empty() {
            request = line.trim_end_matches(" HTTP/1.1").to_string();
        } else if let Some((name, value)) = line.split_once(": ") {
            if name.eq_ignore_ascii_case("authorization") {
                token = value.to_string();
            }
        } else {
            break;
        }
    }
    let list = files.iter().map(|(name, _)| format!(r#"{{"rfilename": "{name}"}}"#));
    let list = list.collect::<Vec<_>>().join(", ");
    let resolve = "GET /org/model/resolve/main/";
    let (status, body) = match request.as_str() {
        _ if token == "Bearer wrong" => ("401 Unauthorized", String::new()),
        "GET /api/models/org/model/revision/main" => {
            ("200 OK", format!(r#"{{"siblings": [{list}], "sha": "{COMMIT}"}}"#))
        }
        path => match files.iter().find(|(name, _)| path == format!("{resolve}{name}")) {
            Some((_, content)) => ("206 Partial Content", content.clone()),
            None => ("404 Not Found", String::new()),
        },
    };
    let name = request.rsplit('/').next().unwrap_or_default();
    let size = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {size}\r\nContent-Range: bytes 0-{size}/{size}\r\n\
         ETag: \"tag-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n{body}"
    )
    .unwrap();
    (request, token)
}

fn sharded() -> Vec<(&'static str, String)> {
    let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    vec![
        (".gitattributes", "nothing".to_string()),
        ("config.json", "{}".to_string()),
        ("tokenizer.json", "{}".to_string()),
        ("model.safetensors.index.json", index.to_string()),
        ("one.safetensors", "1".repeat(100_000)),
        ("two.safetensors", "2".to_string()),
        ("pytorch_model.bin", "never fetched".to_string()),
    ]
}

#[test]
fn a_model_is_downloaded_once_with_the_token() {
    let (address, requests) = serve(sharded());
    let cache = Folder::new("download");
    let hub = Hub::new(&cache.0).with_endpoint(&address).with_token("secret");
    let folder = hub.fetch("org/model").unwrap();
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "config.json",
        "model.safetensors.index.json",
        "one.safetensors",
        "tokenizer.json",
        "two.safetensors",
    ];
    assert_eq!(names, expected);
    assert_eq!(std::fs::read(folder.join("one.safetensors")).unwrap(), [b'1'; 100_000]);
    let seen: Vec<String> = requests.try_iter().collect();
    assert!(seen.iter().all(|request| request.ends_with("Bearer secret")), "{seen:?}");
    assert!(!seen.iter().any(|request| request.contains("pytorch_model.bin")));

    // From now on the network is not needed, nor asked.
    assert_eq!(hub.fetch("org/model").unwrap(), folder);
    assert_eq!(Hub::new(&cache.0).offline().fetch("org/model").unwrap(), folder);
    assert_eq!(requests.try_iter().count(), 0);
    let cached = hub.cached();
    assert_eq!((cached.len(), cached[0].id.as_str()), (1, "org/model"));
    assert_eq!(cached[0].path, folder);
    assert!(cached[0].bytes > 100_000);
}

#[test]
fn an_interrupted_download_is_completed() {
    let (address, requests) = serve(sharded());
    let cache = Folder::new("resume");
    let [_, config, tokenizer, index, ..] = &sharded()[..] else { unreachable!() };
    let present = [config, tokenizer, index].map(|(name, text)| (*name, text.as_str()));
    let snapshot = cache.add_model("org/model", &present);
    let hub = Hub::new(&cache.0).with_endpoint(&address);
    let offline = Hub::new(&cache.0).offline().fetch("org/model").unwrap_err().to_string();
    let offline = offline.replace(&cache.0.display().to_string(), "CACHE");
    assert_eq!(
        offline,
        "org/model is not in the cache CACHE (file one.safetensors) and HF_HUB_OFFLINE is \
         set; unset it to download the model"
    );
    assert_eq!(hub.fetch("org/model").unwrap(), snapshot);
    assert!(snapshot.join("two.safetensors").is_file());
    assert!(!requests.try_iter().any(|request| request.contains("tokenizer.json")));
}

#[test]
fn what_the_hub_refuses_is_told_apart() {
    let (address, _requests) = serve(sharded());
    let cache = Folder::new("refused");
    let hub = || Hub::new(&cache.0).with_endpoint(&address);
    let error = |hub: Hub, id: &str| hub.fetch(id).unwrap_err().to_string();
    assert_eq!(
        error(hub().with_token("wrong"), "org/model"),
        "the hub refuses org/model (status 401): the model is private, gated or does not \
         exist; accept its terms on its page and set HF_TOKEN"
    );
    assert_eq!(error(hub(), "org/none"), "the hub has no model org/none; check the id's spelling");
    let offline = error(hub().offline(), "org/model");
    assert_eq!(
        offline.replace(&cache.0.display().to_string(), "CACHE"),
        "org/model is not in the cache CACHE (file config.json) and HF_HUB_OFFLINE is set; \
         unset it to download the model"
    );

    let (address, _requests) = serve(vec![("config.json", "{}".to_string())]);
    let weightless = Hub::new(&cache.0).with_endpoint(&address);
    assert_eq!(
        error(weightless, "org/model"),
        "the hub's model org/model has no model.safetensors; only safetensors checkpoints \
         are taken from it"
    );
    let closed = Hub::new(&cache.0).with_endpoint("http://127.0.0.1:1");
    let text = error(closed, "org/model");
    assert!(text.starts_with("cannot download the list of files of org/model: "), "{text}");
    assert!(cache.0.join("models--org--model").read_dir().is_err(), "nothing half-made");
}

#[test]
fn the_cache_lists_models_and_nothing_else() {
    let cache = Folder::new("list");
    assert_eq!(Hub::new(cache.0.join("none")).cached(), []);
    let path = cache.add_model("b/two--dashes", &[("config.json", "{}"), ("x", "123")]);
    cache.add_model("a/no-config", &[("x", "123")]);
    std::fs::create_dir_all(cache.0.join("datasets--a--b")).unwrap();
    std::fs::write(cache.0.join("version.txt"), "1").unwrap();
    let expected = CachedModel { id: "b/two--dashes".to_string(), path, bytes: 5 };
    assert_eq!(Hub::new(&cache.0).cached(), [expected]);
}
