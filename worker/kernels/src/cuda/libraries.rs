//! Lists the CUDA libraries this process has opened. A machine may have several versions of each, and the loader takes
//! the first it finds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::cuda_backend::cudarc::{cublaslt, cudnn, driver};

use crate::unavailable::Library;

/// Name prefixes of the libraries to list.
const PREFIXES: [&str; 4] = ["libcuda.so", "libcublas", "libcurand", "libcudnn"];

/// The open libraries, sorted by path.
pub(crate) fn libraries() -> Vec<Library> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let libraries = mapped(&maps).into_iter();
    libraries.map(|path| Library { name: name(&path), version: version(&name(&path)), path }).collect()
}

/// Warns if libraries that belong together come from different directories, for example from two toolkits.
pub(super) fn warn_if_mixed() {
    for family in ["libcublas", "libcudnn"] {
        let of_family: Vec<_> = libraries().into_iter().filter(|library| library.name.starts_with(family)).collect();
        let places: BTreeSet<_> = of_family.iter().filter_map(|library| library.path.parent()).collect();
        if places.len() > 1 {
            tracing::warn!(
                ?places,
                "parts of {family} come from several places: put one of these directories first in LD_LIBRARY_PATH"
            );
        }
    }
}

/// The libraries' files among a process's mappings, in the format of /proc/PID/maps.
fn mapped(maps: &str) -> BTreeSet<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let ours = |path: &&Path| PREFIXES.iter().any(|prefix| file_name(path).starts_with(prefix));
    paths.filter(ours).map(Path::to_owned).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A library's name without its version.
fn name(path: &Path) -> String {
    let name = file_name(path);
    name.split(".so").next().unwrap_or_default().to_owned()
}

/// The version an open library reports, for the libraries that have a call for it.
fn version(library: &str) -> Option<String> {
    // SAFETY: the libraries are open, so their functions exist; these only return a number.
    let number = unsafe {
        match library {
            "libcuda" => {
                let mut version = 0;
                driver::sys::cuDriverGetVersion(&raw mut version).result().ok()?;
                version as usize
            }
            "libcublasLt" => cublaslt::sys::cublasLtGetVersion(),
            "libcudnn" => cudnn::sys::cudnnGetVersion(),
            _ => return None,
        }
    };
    // Each library encodes its version differently: 13000 is the driver's CUDA 13.0, 130200 is cuBLASLt 13.2.0, 91300
    // is cuDNN 9.13.0.
    let [major, minor, patch] = match library {
        "libcuda" => [number / 1000, number % 1000 / 10, number % 10],
        _ => [number / 10_000, number / 100 % 100, number % 100],
    };
    Some(format!("{major}.{minor}.{patch}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_the_mappings_of_a_process() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 12 /opt/cuda/lib64/libcublasLt.so.13.2.0.9\n\
                    7f01-7f02 r--p 00000000 08:01 12 /opt/cuda/lib64/libcublasLt.so.13.2.0.9\n\
                    7f03-7f04 r-xp 00000000 08:01 13 /usr/lib/libcuda.so.580.95.05\n\
                    7f05-7f06 r-xp 00000000 08:01 14 /site packages/libcudnn_graph.so.9\n\
                    7f07-7f08 r-xp 00000000 08:01 15 /usr/lib/libcudart.so.13\n\
                    7f09-7f0a rw-p 00000000 00:00 0\n";
        let found: Vec<_> = mapped(maps).iter().map(|path| (name(path), path.to_string_lossy().into_owned())).collect();
        let expected = [
            ("libcublasLt", "/opt/cuda/lib64/libcublasLt.so.13.2.0.9"),
            ("libcudnn_graph", "/site packages/libcudnn_graph.so.9"),
            ("libcuda", "/usr/lib/libcuda.so.580.95.05"),
        ];
        assert_eq!(found, expected.map(|(name, path)| (name.to_owned(), path.to_owned())));
    }
}
