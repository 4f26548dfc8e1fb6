//! What coordinators and workers both need at their rim: [`tls`] from PEM files, [`listen`], which hangs up on those who
//! connect and say nothing, [`seldom`], which keeps them from filling the log, and [`http`], the side for probes, Prometheus and people.

pub mod host;
pub mod http;
pub mod listen;
mod renewed;
pub mod seldom;
pub mod tls;

pub use host::Hosts;
pub use http::{Operations, Operator};
pub use listen::{Doorkeeper, Limits};
pub use seldom::Seldom;
pub use tls::{ClientTls, ServerTls, TlsError, TlsProblem};
