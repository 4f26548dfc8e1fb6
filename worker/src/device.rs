//! What the engines of a worker compute on, as `--device` says it.

use std::fmt;
use std::str::FromStr;

/// What one engine computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Cores of this machine.
    Cpu,
    /// A CUDA device by its number; every one there is where it has none.
    Cuda(Option<usize>),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(None) => write!(f, "cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

/// The devices of a worker, an engine for each: `cpu`, `cpu,cpu`, `cuda`, `cuda:0,1`, `cuda:0,cpu`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

/// A list of devices that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// It is none.
    #[error("'{0}' is no device: use cpu, or a list like cpu,cpu or cuda:0,1")]
    Unknown(String),
    /// This program does not know the device.
    #[error("--device {0} is not available in this build: use --device cpu")]
    Unavailable(Device),
}

impl Devices {
    /// The engines of a worker that has `count` of them, taking turns with the devices.
    pub fn engines(&self, count: usize) -> Vec<Device> {
        self.0.iter().copied().cycle().take(count).collect()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Default for Devices {
    fn default() -> Self {
        Self(vec![Device::Cpu])
    }
}

impl FromStr for Devices {
    type Err = DeviceError;

    fn from_str(list: &str) -> Result<Self, DeviceError> {
        let mut devices: Vec<Device> = Vec::new();
        let mut numbered = false;
        for item in list.split(',').map(str::trim) {
            let device = match item.strip_prefix("cuda:").or(Some(item).filter(|_| numbered)).map(str::parse) {
                Some(Ok(number)) => Device::Cuda(Some(number)),
                _ if item == "cpu" => Device::Cpu,
                _ if item == "cuda" => Device::Cuda(None),
                _ => return Err(DeviceError::Unknown(item.to_owned())),
            };
            // After cuda:0 a bare number is another one.
            numbered = matches!(device, Device::Cuda(Some(_)));
            devices.push(device);
        }
        match devices.iter().find(|device| **device != Device::Cpu) {
            Some(device) => Err(DeviceError::Unavailable(*device)),
            None => Ok(Self(devices)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_an_engine_for_each_of_its_devices() {
        let devices = |list: &str| list.parse::<Devices>();
        assert_eq!(devices("cpu"), Ok(Devices::default()));
        assert_eq!(devices("cpu, cpu").unwrap().count(), 2);
        assert_eq!(devices("cpu").unwrap().engines(3), [Device::Cpu; 3]);
        for (list, first) in [("cuda", "cuda"), ("cuda:1,0", "cuda:1"), ("cpu,cuda:3", "cuda:3")] {
            let error = devices(list).unwrap_err().to_string();
            assert!(error.contains(&format!("{first} is not available")), "{error}");
        }
        for list in ["", "gpu", "cpu:0", "0", "cpu,1", "cuda:x", "cuda:0,1,x"] {
            assert!(matches!(devices(list), Err(DeviceError::Unknown(_))), "{list}");
        }
    }
}
