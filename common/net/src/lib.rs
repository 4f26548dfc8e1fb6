//! Networking for coordinators and workers: [`tls`] from PEM files; [`listen`], which closes silent connections;
//! [`rate_limited_log`], which keeps clients from filling the log; and [`http`], the server for probes, Prometheus and people.

pub mod host;
pub mod http;
pub mod listen;
pub mod rate_limited_log;
mod renewed;
pub mod tls;
mod tls_error;

pub use host::Hosts;
pub use http::{Operations, Operator};
pub use listen::{Door, LimitedListener, Limits};
pub use rate_limited_log::RateLimitedLog;
pub use tls::{ClientTls, ServerTls, TlsProblem};
pub use tls_error::TlsError;
