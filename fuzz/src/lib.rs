//! Code shared by the targets for image sources.

use std::path::PathBuf;

use elbo_data::{ListOptions, Reader, list};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// How many of the listed samples are read.
const READ: usize = 8;
/// Maximum image size in bytes; a source may claim any size.
const LIMIT: u64 = 1 << 20;

struct World {
    runtime: Runtime,
    directory: TempDir,
}

thread_local! {
    static WORLD: World = World {
        runtime: Builder::new_current_thread().enable_all().build().expect("a runtime"),
        directory: TempDir::new().expect("a directory"),
    };
}

/// Lists `bytes` as a file of this name, with and without captions, and reads the listed samples. The samples have
/// their positions as ids and stay within the limit, or there is an error; never a panic, a hang or unbounded memory
/// use.
pub fn list_and_read(name: &str, bytes: &[u8]) {
    WORLD.with(|world| {
        let path: PathBuf = world.directory.path().join(name);
        std::fs::write(&path, bytes).expect("writing");
        let source = path.to_str().expect("a name");
        world.runtime.block_on(async {
            for candidates in [None, Some("captions")] {
                let mut samples = Vec::new();
                let options = ListOptions { candidates, limit: Some(1000), ..ListOptions::default() };
                let Ok(listed) = list(source, &options, &mut samples).await else { continue };
                assert_eq!(listed.samples, samples.len() as u64);
                assert!((0..).zip(&samples).all(|(id, sample)| sample.id.0 == id));
                let reader = Reader::new().with_limit(LIMIT);
                for sample in samples.iter().take(READ) {
                    if let Ok(image) = reader.read(&sample.into()).await {
                        assert!(image.len() as u64 <= LIMIT);
                    }
                }
            }
        });
    });
}
