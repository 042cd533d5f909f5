//! When requests are sent, and what became of each.
//!
//! Knows nothing of HTTP: who answers is the caller's.

use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::super::workload::Random;

/// One request, as the workload draws it.
#[derive(Debug, Clone)]
pub struct Work {
    pub prompt: Vec<u32>,
    pub output_len: usize,
    pub seed: u64,
}

/// When the next request is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// When one of so many has ended.
    AtATime(usize),
    /// So many a second, at times that know nothing of each other.
    ASecond(f64),
}

/// An answer's way through time, in seconds since its request was sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Times {
    /// When text came.
    pub arrivals: Vec<f64>,
    /// When it had ended.
    pub end: f64,
    /// Tokens generated: what the server says, else the arrivals.
    pub tokens: usize,
}

impl Times {
    pub fn first(&self) -> f64 {
        self.arrivals.first().copied().unwrap_or(self.end)
    }

    /// Seconds between neighbouring arrivals.
    pub fn gaps(&self) -> impl Iterator<Item = f64> {
        self.arrivals.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// What became of a request.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Seconds since the first request.
    pub sent: f64,
    /// The reason where it failed.
    pub times: Result<Times, String>,
}

/// What became of all.
#[derive(Debug, Default)]
pub struct Run {
    pub answers: Vec<Answer>,
    /// From the first request to the end of the last answer.
    pub seconds: f64,
}

impl Run {
    /// Another run of the same load, after this one.
    pub fn add(&mut self, other: Self) {
        let later = |answer: Answer| Answer { sent: answer.sent + self.seconds, ..answer };
        self.answers.extend(other.answers.into_iter().map(later));
        self.seconds += other.seconds;
    }
}

/// Sends all of it at its pace, and waits for all.
pub async fn drive<F: Future<Output = Result<Times, String>>>(
    pace: Pace,
    works: Vec<Work>,
    random: &mut Random,
    answer: impl Fn(Work) -> F,
) -> Run {
    let mut due = 0.0;
    let timed: Vec<(f64, Work)> = works
        .into_iter()
        .map(|work| {
            if let Pace::ASecond(rate) = pace {
                due += -random.unit().ln() / rate;
            }
            (due, work)
        })
        .collect();
    let started = Instant::now();
    let requests = stream::iter(timed).map(|(due, work)| {
        let answer = &answer;
        async move {
            sleep_until(started + Duration::from_secs_f64(due)).await;
            let sent = started.elapsed().as_secs_f64();
            Answer { sent, times: answer(work).await }
        }
    });
    let at_once = match pace {
        Pace::AtATime(count) => count,
        Pace::ASecond(_) => usize::MAX,
    };
    let answers = requests.buffer_unordered(at_once).collect().await;
    Run { answers, seconds: started.elapsed().as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn works(count: u64) -> Vec<Work> {
        (0..count).map(|seed| Work { prompt: vec![1], output_len: 1, seed }).collect()
    }

    fn run(pace: Pace, count: u64) -> (Run, usize) {
        let (now, most) = (Cell::new(0usize), Cell::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime can be made");
        let run = runtime.block_on(drive(pace, works(count), &mut Random::new(1), |work| {
            let (now, most) = (&now, &most);
            async move {
                now.set(now.get() + 1);
                most.set(most.get().max(now.get()));
                tokio::task::yield_now().await;
                now.set(now.get() - 1);
                if work.seed == 3 { Err("it failed".to_owned()) } else { Ok(Times::default()) }
            }
        }));
        (run, most.get())
    }

    #[test]
    fn so_many_are_under_way_at_a_time_and_no_more() {
        for at_once in [1, 3, 50] {
            let (run, most) = run(Pace::AtATime(at_once), 20);
            assert_eq!((run.answers.len(), most), (20, at_once.min(20)));
            let failed = run.answers.iter().filter(|answer| answer.times.is_err());
            assert_eq!(failed.count(), 1);
        }
    }

    #[test]
    fn random_times_have_the_mean_that_was_asked_for() {
        let (run, _) = run(Pace::ASecond(4000.0), 400);
        let last = run.answers.iter().map(|answer| answer.sent).fold(0.0, f64::max);
        assert!((0.08..0.2).contains(&last), "400 at 4000 a second take a tenth: {last}");
    }

    #[test]
    fn gaps_lie_between_arrivals() {
        let times = Times { arrivals: vec![0.5, 0.75, 1.0], end: 1.5, tokens: 3 };
        assert_eq!((times.first(), times.gaps().collect()), (0.5, vec![0.25, 0.25]));
        assert_eq!(Times { end: 2.0, ..Times::default() }.first(), 2.0);
    }
}
