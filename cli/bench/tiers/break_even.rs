//! From which length on loading a chunk is faster than encoding it. Pure.

/// What a length costs both ways, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub tokens: f64,
    pub encode: f64,
    pub load: f64,
}

/// The shortest length in tokens at which loading is faster: where the line through the loads
/// (least squares; through 0 where there is one length) crosses that through the encodings.
/// `None`: at no length.
pub fn break_even(points: &[Point]) -> Option<f64> {
    let gains: Vec<(f64, f64)> =
        points.iter().map(|point| (point.tokens, point.encode - point.load)).collect();
    // the gain at n tokens is start + slope x n
    let (start, slope) = line(&gains);
    if slope > 0.0 {
        return Some((-start / slope).max(1.0));
    }
    gains.iter().all(|&(_, gain)| gain > 0.0).then_some(1.0)
}

/// Start and slope of the line nearest to all points.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if spread == 0.0 {
        return (0.0, y / x);
    }
    let slope = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>() / spread;
    (y - slope * x, slope)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 ms before the first token is there, then 0.1 ms a token; encoding takes 1 ms a token.
    fn at(tokens: f64) -> Point {
        Point { tokens, encode: tokens * 1e-3, load: 1e-2 + tokens * 1e-4 }
    }

    #[test]
    fn lines_cross_where_both_take_the_same_time() {
        let tokens = break_even(&[at(64.0), at(256.0), at(1024.0)]).expect("they cross");
        assert!((tokens - 1e-2 / 9e-4).abs() < 1e-6, "{tokens}");
    }

    #[test]
    fn one_length_tells_always_or_never() {
        assert_eq!(break_even(&[at(64.0)]), Some(1.0));
        assert_eq!(break_even(&[at(4.0)]), None);
    }

    #[test]
    fn what_loses_more_with_every_token_never_pays() {
        let slow = |tokens: f64| Point { tokens, encode: tokens * 1e-3, load: tokens * 2e-3 };
        assert_eq!(break_even(&[slow(64.0), slow(256.0)]), None);
    }
}
