//! How a coordinator runs.

use elbo_net::{Limits, ServerTls};

use crate::scheduler::LeasePolicy;

/// How many samples may be quarantined before the job fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxBad {
    /// A number of samples.
    Count(u64),
    /// A share of the dataset, in percent.
    Percent(f64),
}

impl MaxBad {
    pub(crate) fn allows(self, quarantined: u64, samples: u64) -> bool {
        match self {
            Self::Count(limit) => quarantined <= limit,
            Self::Percent(limit) => quarantined as f64 * 100.0 <= limit * samples as f64,
        }
    }
}

impl std::fmt::Display for MaxBad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Count(limit) => limit.fmt(f),
            Self::Percent(limit) => write!(f, "{limit}%"),
        }
    }
}

impl std::str::FromStr for MaxBad {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is neither a number of samples nor a share like 5%");
        match text.strip_suffix('%') {
            Some(share) => {
                share.trim().parse().ok().filter(|p| (0.0..=100.0).contains(p)).map(Self::Percent).ok_or_else(wrong)
            }
            None => text.parse().map(Self::Count).map_err(|_| wrong()),
        }
    }
}

/// How a coordinator runs. Nothing here changes a result.
#[derive(Clone, Debug)]
pub struct CoordinatorOptions {
    /// How leases are sized and when they end.
    pub leases: LeasePolicy,
    /// How many samples may be quarantined before the job fails.
    pub max_bad: MaxBad,
    /// The token that every call must carry. Without one, anyone who can connect is served.
    pub token: Option<String>,
    /// If set, calls must use TLS.
    pub tls: Option<ServerTls>,
    /// Limits on connections.
    pub limits: Limits,
}
