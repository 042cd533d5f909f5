//! Chunks in `strand chat` over tiers and runs: save, unload, restore, erase, contexts by name.
//!
//! Every test has a data folder of its own, which several runs share one after the other.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};
use strand_engine::ChunkId;

use crate::binary::{Run, command, piped, scratch, strand};

/// Files to load, and a data folder that is empty at first.
struct Place {
    folder: PathBuf,
}

impl Place {
    fn new(name: &str) -> Self {
        let folder = scratch("tiers").join(name);
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(folder.join("files")).expect("it can be made");
        let place = Self { folder };
        place.write("config.py", "MAX_RETRIES = 47\nTIMEOUT = 30\n".repeat(8));
        place.write("notes.txt", "Anna lives in Lisbon. The door is green. ".repeat(8));
        place.write("abc.txt", "abc");
        place
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.folder.join("files").join(name), text).expect("it can be written");
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn path(&self, name: &str) -> String {
        self.folder.join("files").join(name).to_str().expect("UTF-8").to_owned()
    }

    fn arguments(&self, flags: &[&str]) -> Vec<String> {
        let data = self.data().to_str().expect("UTF-8").to_owned();
        let base = ["chat", "--max-tokens", "8", "--temperature", "0", "--data-dir", &data];
        base.iter().chain(flags).map(ToString::to_string).collect()
    }

    /// One run; `DIR` in the input is the folder of the files.
    fn chat(&self, flags: &[&str], input: &str) -> Run {
        let files = self.folder.join("files");
        let input = input.replace("DIR", files.to_str().expect("UTF-8"));
        piped(&self.arguments(flags), input)
    }

    /// The same, with every line's object, where nothing failed.
    fn objects(&self, flags: &[&str], input: &str) -> Vec<Value> {
        let run = self.chat(&[&["--json"], flags].concat(), input);
        assert_eq!((run.status, run.err.as_str()), (0, ""), "{}", run.out);
        run.json()
    }

    fn kv_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.data().join("kv")).expect("there is a store");
        entries.map(|entry| entry.expect("it can be listed").path()).collect()
    }
}

/// Tokens of an answer's prompt that came from there.
fn reuse(answer: &Value, from: &str) -> u64 {
    answer["reuse"][from].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

const QUESTION: &str = "What is MAX_RETRIES?\n";

#[test]
fn a_saved_chunk_is_restored_by_a_later_run_without_being_encoded() {
    let place = Place::new("later");
    let first =
        place.objects(&[], &format!("/load DIR/config.py DIR/notes.txt\n/save all\n{QUESTION}"));
    let (loaded, saved) = (&first[0]["chunks"], &first[1]["chunks"]);
    for (chunk, file) in [0, 1].map(|n| (&loaded[n], &saved[n])) {
        assert_eq!(chunk["id"], file["id"]);
        let [bytes, raw] = ["bytes", "raw_bytes"].map(|key| file[key].as_u64().expect("a number"));
        assert!(bytes > 0 && raw > 0 && file["ratio"].is_number());
    }
    assert_eq!(place.kv_files().len(), 2);

    let prefix = &loaded[1]["id"].as_str().expect("text")[..6];
    let input = format!("/restore config.py\n/restore {prefix}\n/context\n{QUESTION}");
    let second = place.objects(&[], &input);
    for (restored, chunk) in [0, 1].map(|n| (&second[n], &loaded[n])) {
        assert_eq!((&restored["from"], &restored["id"]), (&json!("disk"), &chunk["id"]));
        assert_eq!(restored["tokens"], chunk["tokens"]);
    }
    let table = &second[2]["chunks"];
    assert_eq!(table[0]["position"], loaded[0]["position"]);
    assert!(table[1]["active"] == true && table[1]["name"] == "notes.txt", "{table}");
    assert_eq!(table[0]["tiers"][0], "device");
    assert_eq!(second[3]["token_ids"], first[2]["token_ids"]);
    let tokens = [0, 1].map(|n| loaded[n]["tokens"].as_u64().expect("a number"));
    assert_eq!(reuse(&second[3], "device"), tokens[0] + tokens[1]);
    assert_eq!(second[3]["exactness"], "bitwise");
}

#[test]
fn saving_and_restoring_say_what_was_done() {
    let place = Place::new("says");
    let run = place.chat(&[], "/load DIR/abc.txt\n/save abc.txt\n/unload abc.txt\n/restore abc\n");
    assert!(run.err.contains("No chunk found matching: abc"), "{run:?}");
    let lines: Vec<&str> = run.out.lines().skip(4).collect();
    assert_eq!(lines[0], "✓ Chunk saved: ba7816bf8f01cfea...");
    assert!(lines[1].starts_with("  Bytes: ") && lines[1].contains("ratio"), "{lines:?}");
    assert_eq!(lines[2], "✓ Chunk moved to host memory: ba7816bf8f01cfea...");
    let run = place.chat(&[], "/restore ba78\n");
    let lines: Vec<&str> = run.out.lines().collect();
    assert_eq!(lines[0], "✓ Chunk restored: ba7816bf8f01cfea...", "{run:?}");
    assert!(lines[1].starts_with("  Size: ") && lines[1].ends_with(" tokens"), "{lines:?}");
    assert!(lines[2].starts_with("  From: disk, ") && lines[2].ends_with(" ms"), "{lines:?}");
}

#[test]
fn an_unloaded_chunk_waits_in_host_memory() {
    let place = Place::new("host");
    let lines = place.objects(
        &[],
        "/load DIR/config.py\n/populate config.py\n/unload config.py\n/context\n\
         /restore config.py\n/context\n/unload config.py\n/populate config.py\n",
    );
    assert_eq!(lines[1]["already_populated"], true);
    assert!(lines[2]["blocks"].as_u64() > Some(0) && lines[2]["bytes"].as_u64() > Some(0));
    let (away, back) = (&lines[3], &lines[5]);
    assert_eq!(away["chunks"][0]["tiers"], json!(["host"]));
    assert_eq!(
        (&away["chunks"][0]["active"], &away["tiers"]["device"]),
        (&json!(false), &json!(0))
    );
    assert_eq!(away["tiers"]["host"], lines[2]["bytes"]);
    assert_eq!(lines[4]["from"], "host");
    assert_eq!(back["chunks"][0]["tiers"][0], "device");
    assert_eq!(back["chunks"][0]["active"], true);
    assert_eq!(
        (&lines[7]["already_populated"], &lines[7]["from"]),
        (&json!(false), &json!("host"))
    );
}

#[test]
fn what_is_nowhere_cannot_be_restored_but_populated() {
    let place = Place::new("nowhere");
    place.objects(&[], "/load DIR/config.py\n/save config.py\n");
    for file in place.kv_files() {
        fs::remove_file(file).expect("it can be removed");
    }
    let run = place.chat(&[], "/restore config.py\n/context\n");
    assert_eq!(run.status, 1);
    let told = "config.py has no KV in host memory or on disk under independent; \
                /populate computes it\n";
    assert_eq!(run.err, told);
    assert!(run.out.contains("Used: 0 tokens") && !run.out.contains('#'), "{}", run.out);
    let lines = place.objects(&[], "/populate config.py\n/context\n");
    assert_eq!(
        (&lines[0]["from"], &lines[0]["already_populated"]),
        (&json!("text"), &json!(false))
    );
    let chunk = &lines[1]["chunks"][0];
    assert_eq!((&chunk["active"], &chunk["tiers"]), (&json!(false), &json!(["device"])));
    let run = place.chat(&[], "/restore none\n/unload #1\n/populate #1\n/save all\n");
    assert_eq!(run.status, 1);
    assert!(run.err.starts_with("No chunk found matching: none\n"), "{}", run.err);
    assert_eq!(run.out, "There are no chunks to save\n");
}

#[test]
fn a_damaged_file_is_put_aside_and_the_chunk_encoded_again() {
    let place = Place::new("damaged");
    let asked = format!("/load DIR/config.py\n/save config.py\n{QUESTION}");
    let answer = place.objects(&[], &asked).remove(2);
    let file = place.kv_files().remove(0);
    let mut bytes = fs::read(&file).expect("it can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).expect("it can be written");
    let run = place.chat(&["--json"], &format!("/restore config.py\n{QUESTION}"));
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.err.contains(".kv"), "it is told: {}", run.err);
    let lines = run.json();
    assert_eq!(lines[0]["from"], "text");
    assert_eq!(lines[1]["token_ids"], answer["token_ids"]);
    assert!(place.kv_files().is_empty());
}

#[test]
fn erasing_removes_what_was_saved_and_clearing_does_not() {
    let place = Place::new("erase");
    place.objects(&[], "/load DIR/config.py DIR/notes.txt DIR/abc.txt\n/save all\n/clear\n");
    assert_eq!(place.kv_files().len(), 3);
    let lines = place.objects(&[], "/restore notes.txt\n/erase notes.txt\n/erase abc.txt\n");
    assert_eq!(lines[2]["ok"], true, "also one that is only in the store");
    assert_eq!(place.kv_files().len(), 1);
    let run = place.chat(&[], "/restore notes.txt\n");
    run.refused(1, "No chunk found matching: notes.txt");
    let lines = place
        .objects(&[], "/restore config.py\n/clear\n/context\n/restore config.py\n/clear --saved\n");
    assert_eq!(lines[2]["chunks"], json!([]));
    assert_eq!((&lines[2]["tiers"]["device"], &lines[3]["from"]), (&json!(0), &json!("disk")));
    assert!(place.kv_files().is_empty());
    place.chat(&[], "/restore config.py\n").refused(1, "No chunk found matching: config.py");
    let again = place.objects(&[], "/load DIR/config.py --name other\n/context\n");
    assert_eq!(again[1]["chunks"][0]["name"], "other", "after an erase it is new");
}

#[test]
fn content_that_is_saved_keeps_its_name() {
    let place = Place::new("name");
    place.objects(&[], "/load DIR/abc.txt --name first\n/save first\n");
    let run = place.chat(&[], "/load DIR/abc.txt\n/load DIR/abc.txt --name first\n");
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    let expected = "✓ Chunk already loaded as first: ba7816bf8f01cfea...\n".repeat(2);
    assert_eq!(run.out, expected);
    let run = place.chat(&[], "/load DIR/abc.txt --name second\n/context\n");
    assert_eq!(run.status, 1);
    assert!(run.err.contains("the chunk first already"), "{}", run.err);
    assert!(run.out.contains("Used: 0 tokens"));
    // what was saved under that name is found by it, and not encoded again
    let lines = place.objects(&["--restore", "always"], "/load DIR/abc.txt\n");
    assert_eq!(lines[0]["chunks"][0]["reuse"]["disk"], lines[0]["chunks"][0]["tokens"]);
    let lines = place.objects(&["--restore", "never"], "/load DIR/abc.txt\n");
    assert_eq!(lines[0]["chunks"][0]["reuse"]["disk"], 0);
}

#[test]
fn tags_and_metadata_are_shown() {
    let place = Place::new("tags");
    let lines =
        place.objects(&[], "/load DIR/abc.txt\n/tag abc.txt draft\n/tag #1 'of mine'\n/show #1\n");
    assert_eq!(lines[2]["tags"], json!(["draft", "of mine"]));
    let shown = &lines[3];
    assert_eq!((&shown["tags"], &shown["kept"]), (&lines[2]["tags"], &json!(true)));
    assert!(shown["created"].as_u64() > Some(0) && shown["tiers"] == json!(["device"]));
    assert_eq!((&shown["kind"], &shown["text"]), (&json!("file"), &json!("abc")));
    let later = place.chat(&[], "/load DIR/abc.txt\n/show abc.txt\n");
    assert!(later.out.contains("Tags: draft, of mine\nKept on disk: yes\nabc\n"), "{later:?}");
}

#[test]
fn chunks_are_composed_with_one_newline_between_them() {
    let place = Place::new("compose");
    place.write("line.txt", "one line\n");
    let input = "/load DIR/abc.txt DIR/line.txt\n/compose abc.txt line.txt abc.txt\n/show #3\n";
    let lines = place.objects(&[], input);
    let text = "abc\none line\nabc";
    assert_eq!(lines[2]["text"], text);
    assert_eq!(lines[1]["id"], ChunkId::of(text.as_bytes()).to_string());
    assert_eq!((&lines[1]["from"], &lines[1]["active"]), (&json!(3), &json!(true)));
    let run = place.chat(&[], "/load DIR/abc.txt DIR/line.txt\n/compose #1 #2\n");
    let told: Vec<&str> = run.out.lines().skip(8).collect();
    assert_eq!(told[0], "✓ Added chunk:", "{run:?}");
    assert_eq!(told.last(), Some(&"  From: 2 chunks"));
}

#[test]
fn a_context_is_found_again_by_its_name() {
    for policy in ["blend", "mask"] {
        let place = Place::new(&format!("context-{policy}"));
        let named = ["--context", "my work"];
        let begin = format!(
            "/system Be brief.\n/load DIR/config.py DIR/notes.txt\n/policy {policy}\n\
             {QUESTION}/deactivate notes.txt\nWhy?\n"
        );
        let first = place.objects(&named, &format!("{begin}/context\n/history\n"));
        let go_on = "/activate notes.txt\nAnd TIMEOUT?\n";
        let second = place.objects(&named, &format!("/context\n/history\n{go_on}"));
        let before = &first[6];
        for key in ["used_tokens", "policy"] {
            assert_eq!(second[0][key], before[key], "{key}");
        }
        for (now, then) in [0, 1].map(|n| (&second[0]["chunks"][n], &before["chunks"][n])) {
            for key in ["id", "name", "active", "position"] {
                assert_eq!(now[key], then[key], "{key}");
            }
        }
        assert_eq!(second[1], first[7], "what was said is still said");
        // the same answer as if the first run had gone on
        let whole = place.objects(&["--context", "other"], &format!("{begin}{go_on}"));
        for key in ["token_ids", "prompt_tokens", "exactness"] {
            assert_eq!(second[3][key], whole[7][key], "{policy}: {key}");
        }
        let third = place.objects(&named, "/history\n/reset\n/erase notes.txt\n");
        assert_eq!(third[0]["turns"].as_array().map(Vec::len), Some(6));
        let fourth = place.objects(&named, "/history\n/context\n");
        assert_eq!((&fourth[0]["turns"], &fourth[0]["system"]), (&json!([]), &json!("Be brief.")));
        assert_eq!(fourth[1]["chunks"].as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn what_the_pool_has_no_room_for_comes_back_from_the_host() {
    let place = Place::new("pressure");
    for name in 0..8 {
        place.write(&format!("big{name}.txt"), format!("Door {name} is green. ").repeat(16));
    }
    // the pool holds two of them
    let flags = ["--kv-memory", "1MiB", "--max-model-len", "256"];
    let input = format!("/load DIR/big*.txt --inactive\n/context\n/activate big0.txt\n{QUESTION}");
    let lines = place.objects(&flags, &input);
    let tokens = |n: usize| lines[0]["chunks"][n]["tokens"].as_u64().expect("a number");
    let tiers = |n: usize| &lines[1]["chunks"][n]["tiers"];
    assert!(tokens(0) > 64, "{}", lines[0]);
    assert_eq!((tiers(0), tiers(7)), (&json!(["host"]), &json!(["device"])));
    assert_eq!(reuse(&lines[3], "host"), tokens(0));
    assert_eq!(lines[3]["exactness"], "bitwise");
}

#[test]
fn a_store_that_is_in_use_is_gone_without() {
    let place = Place::new("locked");
    let mut owner = command(&place.arguments(&[])).stdin(Stdio::piped()).spawn().expect("started");
    let mut stdin = owner.stdin.take().expect("piped");
    let mut out = BufReader::new(owner.stdout.take().expect("piped"));
    stdin.write_all(b"/policy\n").expect("it reads");
    out.read_line(&mut String::new()).expect("it has opened its store");
    let run = place.chat(
        &[],
        "/load DIR/abc.txt\n/save abc.txt\n/tag #1 x\n/unload #1\n/restore #1\n\
             /erase #1\n/clear --saved\n/context\n/clear\n",
    );
    assert_eq!(run.status, 1);
    let lines: Vec<&str> = run.err.lines().collect();
    assert!(lines[0].starts_with("note: nothing is kept on disk: "), "{lines:?}");
    assert!(lines[0].contains("in use by"), "{lines:?}");
    assert!(lines[1].starts_with("nothing can be saved: "), "{lines:?}");
    assert!(lines[2].starts_with("nothing can be saved: "), "{lines:?}");
    assert!(lines[3].starts_with("nothing can be erased: "), "{lines:?}");
    assert!(lines[4].starts_with("nothing can be erased: "), "{lines:?}");
    assert_eq!(lines.len(), 5, "the rest works: {lines:?}");
    assert!(run.out.contains("#1 ") && run.out.ends_with("✓ All chunks cleared\n"), "{run:?}");
    assert!(run.out.contains("  From: host, "), "{}", run.out);
    let named = place.chat(&["--context", "a"], "/policy\n");
    named.refused(1, "cannot keep the context a: ");
    drop(stdin);
    assert!(owner.wait().expect("it ends").success());
}

#[test]
fn a_data_folder_that_cannot_be_made_is_named() {
    let place = Place::new("no-folder");
    fs::write(place.data(), "a file").expect("it can be written");
    let run = place.chat(&[], "/load DIR/abc.txt\n/save abc.txt\n");
    assert_eq!(run.status, 1);
    assert!(run.err.starts_with("note: nothing is kept on disk: "), "{}", run.err);
    assert!(run.out.starts_with("✓ Added chunk:"));
}

#[test]
fn generate_takes_saved_chunks_and_opens_no_store_without_chunks() {
    let place = Place::new("generate");
    let data = place.data().to_str().expect("UTF-8").to_owned();
    let file = place.path("config.py");
    let ask = |flags: &[&str]| {
        let base = ["generate", "--json", "--chat", "-p", "What is MAX_RETRIES?"];
        let more = ["--temperature", "0", "--max-tokens", "8", "--data-dir", &data];
        let run = strand(&[&base[..], &more, flags].concat());
        assert_eq!((run.status, run.err.as_str()), (0, ""));
        run.json().remove(0)
    };
    ask(&[]);
    assert!(!place.data().exists(), "nothing was to be looked up");
    place.objects(&[], "/load DIR/config.py --name kept.py\n/save kept.py\n");
    let never = ask(&["--chunk", &file, "--restore", "never"]);
    let always = ask(&["--chunk", &file, "--restore", "always"]);
    assert_eq!((reuse(&never, "disk"), reuse(&always, "encoded")), (0, reuse(&always, "encoded")));
    assert_eq!(reuse(&always, "disk") + reuse(&always, "encoded"), reuse(&never, "encoded"));
    assert!(reuse(&always, "disk") > 0, "under the name it was saved with");
    assert_eq!(always["token_ids"], never["token_ids"]);
}

#[test]
fn int8_is_used_only_when_asked_for_and_says_so() {
    let place = Place::new("int8");
    place.objects(&[], "/load DIR/config.py\n/save config.py --codec int8\n");
    let exact =
        place.objects(&["--restore", "always"], &format!("/load DIR/config.py\n{QUESTION}"));
    assert_eq!((reuse(&exact[1], "disk"), &exact[1]["exactness"]), (0, &json!("bitwise")));
    let flags = ["--restore", "always", "--kv-codec", "int8"];
    let lossy = place.objects(&flags, &format!("/restore config.py\n{QUESTION}"));
    assert_eq!(lossy[0]["from"], "disk");
    assert_eq!(lossy[1]["exactness"], "approximate");
    let run = place.chat(&[], "/restore config.py\n");
    assert!(run.err.contains("has no KV in host memory or on disk under"), "{run:?}");
}

#[test]
fn kv_held_as_int8_takes_half_is_saved_and_restored_bit_for_bit() {
    let place = Place::new("held-int8");
    let flags = ["--kv-dtype", "int8", "--restore", "always"];
    let input = format!("/load DIR/config.py\n/save config.py\n{QUESTION}");
    let (plain, held) = (place.objects(&[], &input), place.objects(&flags, &input));
    let bytes = |answers: &[Value]| {
        answers[1]["chunks"][0]["raw_bytes"].as_u64().unwrap_or_else(|| panic!("{answers:?}"))
    };
    // heads of 64 numbers: 68 bytes instead of 128
    assert_eq!(bytes(&held) * 128, bytes(&plain) * 68);
    assert_eq!(place.kv_files().len(), 2, "KV of another type is another KV");
    let again = place.objects(&flags, &format!("/restore config.py\n{QUESTION}"));
    assert_eq!((&again[0]["from"], &again[1]["exactness"]), (&json!("disk"), &json!("bitwise")));
    assert_eq!(again[1]["token_ids"], held[2]["token_ids"]);

    let run = place.chat(&flags, "/load DIR/config.py\n/save config.py --codec int8\n");
    assert!(run.err.contains("held as int8 already; save it as planes or raw"), "{run:?}");
    let run = place.chat(&["--kv-dtype", "int8", "--kv-codec", "int8"], "");
    assert!(run.err.contains("can't be written as int8 again; use --kv-codec planes"), "{run:?}");
}

#[test]
fn a_chunk_that_came_back_with_loss_is_saved_as_computed() {
    let place = Place::new("int8-again");
    let flags = ["--restore", "always", "--kv-codec", "int8"];
    place.objects(&flags, "/load DIR/config.py\n/save config.py\n");
    let file = place.kv_files().remove(0);
    let before = fs::read(&file).expect("it was saved");
    let input = "/restore config.py\n/save config.py\n/save config.py --codec raw\n";
    let lines = place.objects(&flags, input);
    assert_eq!(lines[0]["from"], "disk");
    assert_eq!(fs::read(&file).expect("it is there"), before, "the same rows, the same bytes");
    let exact =
        place.objects(&["--restore", "always"], &format!("/load DIR/config.py\n{QUESTION}"));
    let computed =
        place.objects(&["--restore", "never"], &format!("/load DIR/config.py\n{QUESTION}"));
    assert_eq!(exact[0]["chunks"][0]["reuse"]["disk"], exact[0]["chunks"][0]["tokens"]);
    assert_eq!(exact[1]["token_ids"], computed[1]["token_ids"]);
}

#[test]
fn under_mask_no_chunk_is_placed_behind_the_models_length() {
    let place = Place::new("mask-length");
    for name in ["a", "b"] {
        place.write(name, format!("Door {name} is green. ").repeat(20));
    }
    // each fits alone; the second would see the first
    let flags = ["--reuse", "mask", "--max-model-len", "256"];
    let run = place.chat(&flags, "/load DIR/a\n/load DIR/b\n/context\n/load DIR/abc.txt\n");
    assert!(run.err.contains(" tokens, the model takes at most 256 "), "{run:?}");
    assert!(run.out.contains("#1 ") && !run.out.contains("#2 "), "{run:?}");
    assert_eq!(run.out.matches("✓ Added chunk:").count(), 2, "{run:?}");
}
