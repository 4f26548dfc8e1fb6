//! A small separate disk for an output: ext4 on a loop device, which can lose power, fill up or fail.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A mounted disk; it is unmounted when dropped.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mount: PathBuf,
    _directory: TempDir,
}

impl Disk {
    /// Creates an empty disk, or says why it can't: loop devices need root.
    pub fn new(megabytes: u64) -> Result<Self, String> {
        let directory = TempDir::new().map_err(|e| e.to_string())?;
        let image = directory.path().join("image");
        let file = std::fs::File::create(&image).map_err(|e| e.to_string())?;
        file.set_len(megabytes << 20).map_err(|e| e.to_string())?;
        command(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        Self::mounted(directory, image)
    }

    /// Mounts the disk in an image. Only flushed data reaches it: the next timed commit of the journal is minutes away.
    fn mounted(directory: TempDir, image: PathBuf) -> Result<Self, String> {
        let mount = directory.path().join("mount");
        std::fs::create_dir_all(&mount).map_err(|e| e.to_string())?;
        command(Command::new("mount").args(["-o", "loop,commit=600"]).arg(&image).arg(&mount))?;
        Ok(Self { image, mount, _directory: directory })
    }

    /// Its mount point.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// The disk as it would come back after a power failure now, with only the data that reached the device. Its writers must
    /// be stopped meanwhile.
    pub fn after_power_cut(&self) -> Self {
        let directory = TempDir::new().expect("a directory");
        let image = directory.path().join("image");
        command(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(&image)).expect("copying the image");
        Self::mounted(directory, image).expect("mounting what the power cut left")
    }

    /// Fills the disk; returns the file that takes the space.
    pub fn fill(&self) -> PathBuf {
        let filler = self.mount.join("filler");
        // It ends with an error when the disk is full.
        let _ = command(Command::new("dd").args(["if=/dev/zero", "bs=64k"]).arg(format!("of={}", filler.display())));
        let _ = command(
            Command::new("dd")
                .args(["if=/dev/zero", "bs=1k", "oflag=append", "conv=notrunc"])
                .arg(format!("of={}", filler.display())),
        );
        filler
    }

    /// Makes the disk read-only, or writable again. Returns false if that failed, as it does while a process writes.
    pub fn remount(&self, mode: &str) -> bool {
        command(Command::new("mount").args(["-o", &format!("remount,{mode}")]).arg(&self.mount)).is_ok()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = command(Command::new("umount").args(["-l"]).arg(&self.mount));
    }
}

fn command(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {said}")) }
}
