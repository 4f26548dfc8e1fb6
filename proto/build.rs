//! Compiles the contract with protox, so that no `protoc` is needed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["elbo/v1/elbo.proto"], ["proto"])?;
    let described = std::path::Path::new(&std::env::var("OUT_DIR")?).join("elbo.binpb");
    std::fs::write(described, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
