//! With the feature `cuda`, compiles the CUDA kernels into one image for several architectures.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for Ampere, Hopper and Blackwell. Other devices of these generations run the nearest one; newer devices
/// run the PTX.
const ARCHITECTURES: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90,code=sm_90",
    "arch=compute_100,code=sm_100",
    "arch=compute_80,code=compute_80",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=cuda");
    if let Err(error) = compile() {
        println!(
            "cargo::error=compiling the CUDA kernels: {error}; deploy/cuda/build.sh installs what the build needs"
        );
    }
}

/// The compiler: `$NVCC`, or nvcc in `$CUDA_HOME`, or nvcc on the path.
fn nvcc() -> PathBuf {
    match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => nvcc.into(),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => "nvcc".into(),
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let mut sources: Vec<PathBuf> = fs::read_dir("cuda")
        .map_err(|error| error.to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    // One translation unit, so that one image holds all kernels.
    let all = out.join("kernels.cu");
    let includes = sources.iter().map(|path| {
        let path = fs::canonicalize(path).map_err(|error| error.to_string())?;
        Ok(format!("#include \"{}\"\n", path.display()))
    });
    fs::write(&all, includes.collect::<Result<String, String>>()?).map_err(|error| error.to_string())?;
    let nvcc = nvcc();
    let mut command = Command::new(&nvcc);
    command.args(["--fatbin", "-std=c++17", "-O3", "--compress-mode=size"]);
    command.args(ARCHITECTURES.iter().flat_map(|architecture| ["-gencode", architecture]));
    command.arg("-o").arg(out.join("kernels.fatbin")).arg(&all);
    let done = command.output().map_err(|error| format!("starting {}: {error}", nvcc.display()))?;
    if done.status.success() {
        Ok(())
    } else {
        Err(format!("{}: {}", nvcc.display(), String::from_utf8_lossy(&done.stderr)))
    }
}
