//! What a chunk's KV depends on.

/// Chosen for a whole context; how chunks are placed in a prompt follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReusePolicy {
    /// Every segment before it: classic prefix caching, the reference.
    #[default]
    Exact,
    /// The anchor and itself (block attention): for models trained so.
    Independent,
    /// As independent, but the first rows of every active chunk behind the first are computed
    /// again for what stands before them.
    Blend,
    /// What was active when it was loaded. Switching chunks hides rows and computes none, turns
    /// included: approximate, and every answer says so.
    Mask,
}

impl ReusePolicy {
    pub const ALL: [Self; 4] = [Self::Exact, Self::Independent, Self::Blend, Self::Mask];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Independent => "independent",
            Self::Blend => "blend",
            Self::Mask => "mask",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == text)
    }
}

/// Rows of a chunk that `blend` computes again unless told otherwise.
pub const DEFAULT_BLEND_TOKENS: usize = 16;
