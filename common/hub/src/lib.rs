//! Models: where they come from ([`model_source`]), which of their files a job reads ([`model_files`], [`weight_files`]), what
//! a job needs to know before loading them ([`model_config`]), and the [`fingerprint`] of a job, which covers their content.

pub mod fingerprint;
pub mod model_config;
pub mod model_files;
pub mod model_source;
pub mod weight_files;
