//! Work on several threads whose results come back in order.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// Where a worker's inputs go, and where its results come from.
type Worker<T, U> = (Sender<T>, Receiver<U>);

/// Gives `each` the results of `map` over `inputs`, in their order. Inputs are made and results
/// taken on this thread; at most two inputs per thread are under way. Each thread has a scratch of
/// its own, which `map` may leave anything in. The first error ends it.
pub(super) fn in_order<S: Default, T: Send, U: Send, E: Send>(
    threads: usize,
    inputs: impl Iterator<Item = Result<T, E>>,
    map: impl Fn(&mut S, T) -> Result<U, E> + Sync,
    mut each: impl FnMut(U) -> Result<(), E>,
) -> Result<(), E> {
    if threads <= 1 {
        let mut scratch = S::default();
        for input in inputs {
            each(map(&mut scratch, input?)?)?;
        }
        return Ok(());
    }
    let map = &map;
    thread::scope(|scope| {
        let workers: Vec<Worker<T, Result<U, E>>> = (0..threads)
            .map(|_| {
                let (send_input, inputs) = channel();
                let (send_output, outputs) = channel();
                scope.spawn(move || {
                    let mut scratch = S::default();
                    // ends when the other side has gone, after an error
                    inputs
                        .into_iter()
                        .all(|input| send_output.send(map(&mut scratch, input)).is_ok())
                });
                (send_input, outputs)
            })
            .collect();
        let mut take = |index: usize| {
            let (_, outputs) = &workers[index % threads];
            each(outputs.recv().expect("a worker answers every input unless it panics")?)
        };
        let mut sent = 0;
        let mut taken = 0;
        for input in inputs {
            if sent - taken == 2 * threads {
                take(taken)?;
                taken += 1;
            }
            let (inputs, _) = &workers[sent % threads];
            inputs.send(input?).expect("a worker reads until its sender goes");
            sent += 1;
        }
        (taken..sent).try_for_each(take)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squares(threads: usize, failing: Option<u32>) -> Result<Vec<u32>, u32> {
        let mut found = Vec::new();
        in_order(
            threads,
            (0..100).map(Ok),
            |(): &mut (), n| if Some(n) == failing { Err(n) } else { Ok(n * n) },
            |n| {
                found.push(n);
                Ok(())
            },
        )?;
        Ok(found)
    }

    #[test]
    fn results_come_in_order_with_any_number_of_threads() {
        let expected: Vec<u32> = (0..100).map(|n| n * n).collect();
        for threads in [0, 1, 2, 3, 7, 200] {
            assert_eq!(squares(threads, None), Ok(expected.clone()), "{threads}");
        }
    }

    #[test]
    fn an_error_ends_it() {
        for threads in [1, 2, 7] {
            assert_eq!(squares(threads, Some(41)), Err(41), "{threads}");
            let inputs = (0..50).map(|n| if n == 30 { Err(n) } else { Ok(n) });
            let done = in_order(threads, inputs, |(): &mut (), n| Ok(n), |_| Ok(()));
            assert_eq!(done, Err(30), "{threads}");
        }
    }
}
