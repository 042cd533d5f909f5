//! Ctrl-C: the first press ends the answer, the second the program.
//!
//! While no answer is made there is nothing to end but the program. The handler only flips a
//! state and wakes the thread that waits; whoever makes the answer looks at [`Interrupt::pressed`]
//! and stops in order.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, Thread};

use anyhow::{Context, Result};

/// What a shell reports for a program that Ctrl-C ended.
pub const EXIT_STATUS: u8 = 130;

/// An answer is being made.
const ANSWERING: u8 = 1;
/// It should end.
const PRESSED: u8 = 2;
/// A press has ended an answer: the next one ends the program.
const ARMED: u8 = 4;

/// Says whether the answer in progress should end. Clones look at the same state.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    state: Arc<AtomicU8>,
}

impl Interrupt {
    /// Catches Ctrl-C from now on. Answers must be made on the calling thread, which is woken.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        let (pressed, waiting): (Self, Thread) = (interrupt.clone(), thread::current());
        ctrlc::set_handler(move || {
            if pressed.press() {
                waiting.unpark();
            } else {
                process::exit(i32::from(EXIT_STATUS));
            }
        })
        .context("cannot catch Ctrl-C")?;
        Ok(interrupt)
    }

    /// Until the guard is dropped, a press ends what is being made and not the program.
    pub fn answering(&self) -> Answering<'_> {
        self.state.fetch_or(ANSWERING, Ordering::SeqCst);
        Answering(self)
    }

    /// True after a press during the present answer.
    pub fn pressed(&self) -> bool {
        self.state.load(Ordering::SeqCst) & PRESSED != 0
    }

    /// True if the next press ends the program because one has ended an answer.
    pub fn armed(&self) -> bool {
        self.state.load(Ordering::SeqCst) & ARMED != 0
    }

    /// The user has gone on: the next press is a first one again.
    pub fn disarm(&self) {
        self.state.fetch_and(!ARMED, Ordering::SeqCst);
    }

    /// Notes one press; true if it ends an answer, false if it should end the program.
    fn press(&self) -> bool {
        let (from, to) = (ANSWERING, ANSWERING | PRESSED | ARMED);
        self.state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// An answer in progress.
pub struct Answering<'a>(&'a Interrupt);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!(ANSWERING | PRESSED), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_press_ends_the_answer_and_the_second_the_program() {
        let interrupt = Interrupt::default();
        assert!(!interrupt.press(), "there is no answer to end");
        let guard = interrupt.answering();
        assert!(!interrupt.pressed());
        assert!(interrupt.press());
        assert!(interrupt.pressed());
        assert!(!interrupt.press());
        drop(guard);
        assert!(!interrupt.pressed());
        let _guard = interrupt.answering();
        assert!(!interrupt.pressed(), "the next answer may begin");
        assert!(!interrupt.press(), "two presses end the program, whatever is between them");
    }

    #[test]
    fn who_goes_on_typing_can_end_the_next_answer_too() {
        let interrupt = Interrupt::default();
        let guard = interrupt.answering();
        assert!(interrupt.press());
        drop(guard);
        assert!(interrupt.armed());
        interrupt.disarm();
        let _guard = interrupt.answering();
        assert!(interrupt.press());
    }
}
