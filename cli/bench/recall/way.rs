//! The ways in which chunks can be put before a question.

use strand_engine::context::ReusePolicy;

/// A reuse policy, or independent chunks that went through a lossy file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Policy(ReusePolicy),
    Int8,
}

impl Way {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Policy(policy) => policy.as_str(),
            Self::Int8 => "int8",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "int8" => Some(Self::Int8),
            _ => ReusePolicy::parse(text).map(Self::Policy),
        }
    }

    /// How the chunks are placed.
    pub fn policy(self) -> ReusePolicy {
        match self {
            Self::Policy(policy) => policy,
            Self::Int8 => ReusePolicy::Independent,
        }
    }
}
