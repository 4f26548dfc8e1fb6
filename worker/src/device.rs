//! The devices of a worker's engines, as given by `--device`.

use std::fmt;
use std::str::FromStr;

use elbo_kernels::gpu::{self, Unavailable};
use elbo_kernels::{InstructionSet, InstructionSetError};

/// The device of one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Cores of this machine.
    Cpu,
    /// A CUDA device by its number. Without a number it stands for every CUDA device, until [`Devices::find`] has numbered
    /// them.
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
    /// It is not a device.
    #[error(
        "'{0}' is not a device: use cpu, or a list like cpu,cpu or cuda:0,1; to name GPUs by UUID or MIG name, list them in \
         CUDA_VISIBLE_DEVICES and use cuda"
    )]
    Unknown(String),
    /// It can't be used here.
    #[error("--device {0}: {1}")]
    Unavailable(Device, Unavailable),
    /// This machine's processor lacks the instructions asked for.
    #[error(transparent)]
    Instructions(#[from] InstructionSetError),
}

impl Device {
    /// The device, ready for tensors.
    pub fn open(self) -> Result<candle_core::Device, DeviceError> {
        match self {
            Self::Cpu => {
                InstructionSet::in_use()?;
                Ok(candle_core::Device::Cpu)
            }
            Self::Cuda(number) => {
                gpu::open(number.unwrap_or_default()).map_err(|why| DeviceError::Unavailable(self, why))
            }
        }
    }

    /// What computes: the instruction set, or the GPU's name.
    pub fn hardware(self) -> String {
        match self {
            Self::Cpu => InstructionSet::in_use().map_or_else(|_| self.to_string(), |set| set.to_string()),
            Self::Cuda(number) => {
                gpu::name_of(number.unwrap_or_default()).unwrap_or_else(|| Self::Cuda(None).to_string())
            }
        }
    }

    /// Whether it is a GPU.
    pub fn is_gpu(self) -> bool {
        self != Self::Cpu
    }
}

impl Devices {
    /// Replaces `cuda` by all CUDA devices; an error if a device does not exist or can't be used.
    pub fn find(self) -> Result<Self, DeviceError> {
        let mut found = Vec::new();
        for device in self.0 {
            let unavailable = |why| DeviceError::Unavailable(device, why);
            match device {
                Device::Cpu => {
                    InstructionSet::in_use()?;
                    found.push(device);
                }
                Device::Cuda(None) => match gpu::count().map_err(unavailable)? {
                    0 => return Err(unavailable(Unavailable::NoSuchDevice { number: 0, count: 0 })),
                    count => found.extend((0..count).map(|number| Device::Cuda(Some(number)))),
                },
                Device::Cuda(Some(number)) => match gpu::count().map_err(unavailable)? {
                    count if number >= count => {
                        return Err(unavailable(Unavailable::NoSuchDevice { number, count }));
                    }
                    _ => found.push(device),
                },
            }
        }
        Ok(Self(found))
    }

    /// The devices of `count` engines, taken from the list in turn.
    pub fn engines(&self, count: usize) -> Vec<Device> {
        self.0.iter().copied().cycle().take(count).collect()
    }

    /// The number of devices.
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
            // After cuda:0, a bare number is another CUDA device.
            numbered = matches!(device, Device::Cuda(Some(_)));
            devices.push(device);
        }
        Ok(Self(devices))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_of_a_list_gets_an_engine() {
        let devices = |list: &str| list.parse::<Devices>();
        assert_eq!(devices("cpu"), Ok(Devices::default()));
        assert_eq!(devices("cpu, cpu").unwrap().count(), 2);
        assert_eq!(devices("cpu").unwrap().engines(3), [Device::Cpu; 3]);
        let cuda = |number| Device::Cuda(Some(number));
        assert_eq!(devices("cuda:1,0").unwrap().engines(2), [cuda(1), cuda(0)]);
        assert_eq!(devices("cuda:0,cpu").unwrap().engines(3), [cuda(0), Device::Cpu, cuda(0)]);
        assert_eq!(devices("cuda").unwrap().engines(1), [Device::Cuda(None)]);
        for list in ["", "gpu", "cpu:0", "0", "cpu,1", "cuda:x", "cuda:0,1,x"] {
            assert!(matches!(devices(list), Err(DeviceError::Unknown(_))), "{list}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn an_unavailable_gpu_is_an_error_with_a_remedy() {
        for (list, first) in [("cuda", "cuda"), ("cuda:1,0", "cuda:1"), ("cpu,cuda:3", "cuda:3")] {
            let error = list.parse::<Devices>().unwrap().find().unwrap_err().to_string();
            assert!(error.starts_with(&format!("--device {first}: this program was built without CUDA")), "{error}");
            assert!(error.contains("--device cpu"), "{error}");
        }
        assert_eq!(Devices::default().find(), Ok(Devices::default()));
    }
}
