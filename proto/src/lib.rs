//! The gRPC contract between a coordinator and its workers, generated from `proto/elbo/v1/elbo.proto`.

mod ids;

pub use ids::OutOfRange;

/// Version 1 of the contract.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("elbo.v1");
}

/// The contract as a `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/elbo.binpb"));

/// Workers and coordinators with different values refuse each other.
pub const PROTOCOL: u32 = 6;

/// Largest message either side accepts, in bytes: a block of 4,096 evaluations with all its errors is below 100 kB.
pub const MAX_MESSAGE_BYTES: usize = 32 * 1024 * 1024;
