//! The mean of vectors that come one by one.

/// Sums in the order of arrival, so that it doesn't matter in what pieces they came.
#[derive(Debug, Default)]
pub struct Mean {
    sums: Vec<f64>,
    count: usize,
}

impl Mean {
    pub fn add(&mut self, vector: &[f32]) {
        self.sums.resize(vector.len(), 0.0);
        for (sum, value) in self.sums.iter_mut().zip(vector) {
            *sum += f64::from(*value);
        }
        self.count += 1;
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Empty before the first.
    pub fn get(&self) -> Vec<f32> {
        self.sums.iter().map(|sum| (sum / self.count as f64) as f32).collect()
    }
}
