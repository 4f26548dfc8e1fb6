//! The gRPC contract between a coordinator and its workers, generated from `proto/elbo/v1/elbo.proto`.

mod ids;
mod size;

pub use ids::{LeaveReason, OutOfRange};
pub use size::{ERROR_BYTES, FULL_MESSAGE_BYTES, MAX_MESSAGE_BYTES, TooLarge, bytes_of, check_size, shortened};

/// Version 1 of the contract.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("elbo.v1");
}

/// The contract as a `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/elbo.binpb"));

/// Workers and coordinators with different values refuse each other.
pub const PROTOCOL: u32 = 7;
