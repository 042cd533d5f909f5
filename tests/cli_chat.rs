//! `strand chat` through a pipe: commands, answers, JSON, what is said where.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use crate::binary::{Run, command, piped};

fn chat(input: &str) -> Run {
    piped(&["chat", "--max-tokens", "12", "--seed", "1"], input)
}

fn chat_json(input: &str) -> (i32, Vec<Value>) {
    let run = piped(&["chat", "--json", "--max-tokens", "12", "--seed", "1"], input);
    assert_eq!(run.err, "", "with --json errors are objects too");
    (run.status, run.json())
}

#[test]
fn answers_and_results_go_to_standard_output() {
    let run = chat("/system Be brief.\n\n   \nHello!\n/history\n/quit\nnever said\n");
    assert_eq!((run.status, run.err.as_str()), (0, ""));
    let lines: Vec<&str> = run.out.lines().collect();
    assert_eq!(lines[0], "✓ System text set");
    assert!(run.out.contains("system: Be brief.\nuser: Hello!\nassistant: "), "{}", run.out);
    assert!(!run.out.contains("never said"));
    assert!(!run.out.contains('\x1b'), "no colour in a pipe");
}

#[test]
fn every_line_is_run_and_one_failure_fails_the_run() {
    let run = chat("/x\n/reset now\n/system\n/system Be kind.\nHello!");
    assert_eq!(run.status, 1);
    let errors = "Unknown command: /x\nType /help for available commands\n\
                  Usage: /reset\nUsage: /system <text>\n";
    assert_eq!(run.err, errors);
    let lines: Vec<&str> = run.out.lines().collect();
    assert_eq!(lines[0], "✓ System text set");
    assert!(lines.len() >= 2, "the last line needs no newline: {lines:?}");
}

#[test]
fn a_line_that_is_not_text_fails_alone() {
    let run = piped(&["chat"], b"\xff\xfe\n/system a\n");
    assert_eq!(run.status, 1);
    assert_eq!(run.err, "error: a line of the input is not UTF-8\n");
    assert_eq!(run.out, "✓ System text set\n");
}

#[test]
fn a_message_that_does_not_fit_changes_nothing() {
    let long = "word ".repeat(400);
    let input = format!("{long}\n/history\n");
    let run = piped(&["chat", "--max-model-len", "256", "--max-tokens", "8"], input);
    assert_eq!(run.status, 1);
    assert!(run.err.contains("the last message"), "{}", run.err);
    assert!(run.err.contains("--max-model-len"), "{}", run.err);
    assert_eq!(run.out, "Nothing was said yet\n");
}

#[test]
fn the_oldest_turns_make_room_for_new_ones() {
    let line = "word ".repeat(20);
    let input = format!("{line}\n").repeat(6);
    let run = piped(&["chat", "--max-model-len", "160", "--max-tokens", "8"], input);
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.err.contains("turns no longer fit"), "{}", run.err);
    let flags = ["chat", "--json", "--max-model-len", "160", "--max-tokens", "8"];
    let lines = piped(&flags, format!("{line}\n").repeat(6)).json();
    let dropped = |n: usize| lines[n]["dropped"]["turns"].as_u64();
    assert_eq!(dropped(0), None);
    assert!(dropped(5).is_some_and(|turns| turns > 0 && turns % 2 == 0), "{}", lines[5]);
    assert!(lines[5]["dropped"]["tokens"].as_u64() > Some(0), "{}", lines[5]);
}

#[test]
fn json_answers_every_line_with_one_object() {
    let (status, lines) = chat_json("/system Be brief.\nHello!\n/history\n/x\n/quit\n");
    assert_eq!(status, 1);
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[0], json!({"command": "/system", "ok": true, "system": "Be brief."}));
    assert!(lines[1]["text"].is_string() && lines[1]["token_ids"].is_array());
    assert_eq!(lines[2]["turns"][0], json!({"role": "user", "text": "Hello!"}));
    assert_eq!(lines[2]["turns"][1]["text"], lines[1]["text"]);
    assert_eq!(lines[3]["ok"], false);
    assert!(lines[3]["error"].as_str().is_some_and(|text| text.contains("Unknown command: /x")));
    assert_eq!(lines[4], json!({"command": "/quit", "ok": true}));
}

#[test]
fn what_was_said_before_is_not_encoded_again() {
    let (_, lines) = chat_json(&format!("{}\nAnd then?\n/stats\n", "word ".repeat(60)));
    let first = lines[0]["reuse"]["encoded"].as_u64().expect("a number");
    let again = &lines[1]["reuse"];
    assert!(again["device"].as_u64() >= Some(first / 2), "{again}");
    assert!(again["encoded"].as_u64() < Some(first), "{again}");
    assert_eq!(lines[2]["answers"], 2);
    assert_eq!(lines[2]["blocks_in_use"], 0, "both answers gave their blocks back");
}

#[test]
fn a_reset_forgets_the_turns_and_keeps_the_system_text() {
    let (_, lines) = chat_json("/system Be brief.\nHello!\n/reset\n/history\nHello!\n");
    assert_eq!(lines[2], json!({"command": "/reset", "ok": true, "forgotten_turns": 2}));
    assert_eq!(lines[3]["system"], "Be brief.");
    assert_eq!(lines[3]["turns"], json!([]));
    assert_eq!(lines[4]["prompt_tokens"], lines[1]["prompt_tokens"]);
}

#[test]
fn short_turns_that_fill_the_pool_drop_the_oldest_ones() {
    let lines: String = (0..40).map(|turn| format!("hi {turn}\n")).collect();
    let run = piped(&["chat", "--kv-memory", "512KiB", "--max-tokens", "3"], lines);
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.err.contains("turns no longer fit"), "{run:?}");
}

#[test]
fn information_is_there_for_people_and_programs() {
    let run = chat("/model\n/stats\n/help\n");
    assert_eq!(run.status, 0);
    for text in ["strand-demo", "KV pool:", "/system <text>", "/history", "/quit"] {
        assert!(run.out.contains(text), "{text} is not in {}", run.out);
    }
    let (_, lines) = chat_json("/model\n/stats\n/help\n");
    assert_eq!(lines[0]["model"], "strand-demo");
    assert_eq!(lines[1]["answers"], 0);
    let commands = lines[2]["commands"].as_array().expect("a list");
    assert!(commands.iter().any(|command| command.to_string().contains("/load")), "{commands:?}");
}

#[test]
fn chat_and_generate_agree() {
    let (_, lines) = chat_json("Hello!\n");
    let options = ["generate", "--json", "--chat", "-p", "Hello!", "--max-tokens", "12"];
    let run = crate::binary::strand(&options);
    assert_eq!(run.json()[0]["token_ids"], lines[0]["token_ids"]);
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let mut child = command(&["chat"]).stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    stdin.write_all(b"/system a\n").expect("it reads");
    let mut line = String::new();
    out.read_line(&mut line).expect("it answers");
    drop(out);
    drop(stdin.write_all(b"/help\n/help\n"));
    drop(stdin);
    let mut err = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut err).expect("UTF-8");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_eq!(err, "");
}

/// Sends SIGINT, as Ctrl-C does.
fn press_ctrl_c(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(status.expect("kill is there").success());
}

/// A chat whose answer has begun and won't end by itself for thousands of tokens.
fn long_answer(input: &[u8]) -> (Child, ChildStdout) {
    let mut command = command(&["chat", "--ignore-eos"]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("it starts");
    child.stdin.take().expect("piped").write_all(input).expect("it reads");
    let mut out = child.stdout.take().expect("piped");
    out.read_exact(&mut [0]).expect("the answer begins");
    (child, out)
}

#[test]
fn ctrl_c_ends_the_answer_and_not_the_program() {
    let (mut child, mut out) = long_answer(b"Hello!\n/system a\n");
    press_ctrl_c(&child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("UTF-8");
    assert!(rest.ends_with("\n✓ System text set\n"), "the next line was run: {rest}");
    assert_eq!(child.wait().expect("it ends").code(), Some(1), "an answer was not whole");
}

#[test]
fn ctrl_c_twice_ends_the_program() {
    let (mut child, mut out) = long_answer(b"Hello!\n/stats\nHello!\n");
    press_ctrl_c(&child);
    // what follows the answer is there: the first press has done its work
    let mut said = String::new();
    while !said.contains("KV pool") {
        let mut byte = [0];
        out.read_exact(&mut byte).expect("it goes on");
        said.push(char::from(byte[0]));
    }
    press_ctrl_c(&child);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}
