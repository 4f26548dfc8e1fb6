//! What coordinators and workers both need at their rim: [`tls`] from PEM files, [`listen`], which hangs up on those who
//! connect and say nothing, [`rate_limited_log`], which keeps them from filling the log, and [`http`], the side for probes, Prometheus and people.

pub mod host;
pub mod http;
pub mod listen;
pub mod rate_limited_log;
mod renewed;
pub mod tls;
mod tls_error;

pub use host::Hosts;
pub use http::{Operations, Operator};
pub use listen::{LimitedListener, Limits};
pub use rate_limited_log::RateLimitedLog;
pub use tls::{ClientTls, ServerTls, TlsProblem};
pub use tls_error::TlsError;
