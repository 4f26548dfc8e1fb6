//! Layers of full size, larger than those of any fixture, compared with PyTorch. `deploy/cuda/measure/layers.py` draws and
//! computes them on the same machine, and `deploy/cuda/sanitize.sh` runs the comparison. Also tensors with more values than
//! 32 bits can count.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor, safetensors};
use elbo_kernels::{
    Conv2d, Fused, GroupNorm, KeyValues, LayerNorm, Linear, Padding, Rows, concat_channels, cross_attention, gather,
    geglu, self_attention, upsample_nearest2x,
};
use serde_json::Value;

use crate::reference::device;

/// A layer computed by PyTorch.
struct Layer<'a> {
    json: &'a Value,
    tensors: &'a HashMap<String, Tensor>,
}

impl Layer<'_> {
    fn name(&self) -> &str {
        self.json["name"].as_str().unwrap()
    }

    fn stored(&self, tensor: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("{}.{tensor}", self.name()))
    }

    /// A tensor on the device, in its stored type; on the CPU in f32, since everything is computed in f32 there.
    fn get(&self, tensor: &str) -> Tensor {
        self.optional(tensor).unwrap_or_else(|| panic!("no {tensor} of {}", self.name()))
    }

    fn optional(&self, tensor: &str) -> Option<Tensor> {
        let stored = self.stored(tensor)?;
        let dtype = if device().is_cpu() { DType::F32 } else { stored.dtype() };
        Some(stored.to_device(&device()).unwrap().to_dtype(dtype).unwrap())
    }

    fn number(&self, key: &str) -> usize {
        self.json[key].as_u64().unwrap() as usize
    }

    fn compute(&self) -> Result<Tensor> {
        let eps = || self.json["eps"].as_f64().unwrap();
        match self.json["op"].as_str().unwrap() {
            "conv2d" => {
                let (weight, bias) = (self.get("weight"), self.get("bias"));
                let conv = Conv2d::new(&weight, Some(&bias), self.number("stride"), Padding::Around)?;
                conv.forward(&self.get("x"), Fused::default())
            }
            "resnet_conv" => {
                let norm = self.group_norm(eps())?;
                let conv = Conv2d::new(&self.get("weight"), Some(&self.get("bias")), 1, Padding::Around)?;
                let (shift, residual) = (self.get("shift"), self.get("residual"));
                let (shift, residual) = (Some(Rows::direct(&shift)), Some(Rows::direct(&residual)));
                conv.forward(&self.get("x"), Fused { norm: Some(&norm), shift, residual })
            }
            "linear" => {
                let residual = self.optional("residual");
                let layer = Linear::new(&self.get("weight"), Some(&self.get("bias")))?;
                layer.forward(&self.get("x"), residual.as_ref().map(Rows::direct))
            }
            "self_attention" => self_attention(&self.get("qkv"), self.number("heads"), false),
            "cross_attention" => {
                let q = self.get("q");
                let pairs: Vec<_> = (0..q.dim(0)? as u32).map(|i| (i, i)).collect();
                let cache = KeyValues::new(&self.get("keys"), &self.get("values"), self.number("heads"))?;
                cross_attention(&q, &cache, &pairs)
            }
            "group_norm" => self.group_norm(eps())?.forward(&self.get("x"), self.number("activate") == 1),
            "layer_norm" => LayerNorm::new(eps(), &self.get("weight"), &self.get("bias"))?.forward(&self.get("x")),
            "geglu_feed_forward" => {
                let linear = |weight, bias| Linear::new(&self.get(weight), Some(&self.get(bias)));
                let x = self.get("x");
                linear("w2", "b2")?.forward(&geglu(&linear("w1", "b1")?.forward(&x, None)?)?, None)
            }
            op => panic!("{}: {op} is not known", self.name()),
        }
    }

    fn group_norm(&self, eps: f64) -> Result<GroupNorm> {
        let of_resnet = self.stored("norm_weight").is_some();
        let [weight, bias] = if of_resnet { ["norm_weight", "norm_bias"] } else { ["weight", "bias"] };
        GroupNorm::new(self.number("groups"), eps, &self.get(weight), &self.get(bias))
    }
}

/// The norm of the difference divided by the norm of the expected tensor.
fn relative(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all();
    let (found, expected) = (wide(found)?, wide(expected)?);
    let length = |t: &Tensor| Ok::<f64, candle_core::Error>(f64::from(t.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt());
    Ok(length(&(&found - &expected)?)? / length(&expected)?)
}

#[test]
#[ignore = "ELBO_LAYERS=DIR, which deploy/cuda/measure/layers.py has made"]
fn layers_of_full_size_are_as_precise_as_pytorch() {
    let dir = PathBuf::from(std::env::var_os("ELBO_LAYERS").unwrap());
    let made: Value = serde_json::from_slice(&std::fs::read(dir.join("layers.json")).unwrap()).unwrap();
    let tensors = safetensors::load(dir.join("layers.safetensors"), &Device::Cpu).unwrap();
    let layers = made["layers"].as_array().unwrap();
    assert!(!layers.is_empty());
    let mut wrong = Vec::new();
    for json in layers {
        let layer = Layer { json, tensors: &tensors };
        let theirs = json["peer_error"].as_f64().unwrap();
        let found = layer.compute().unwrap();
        let expected = layer.stored("out").unwrap();
        assert_eq!(found.dims(), expected.dims(), "{}", layer.name());
        let ours = relative(&found, expected).unwrap();
        // For scripts: the layer, the error of this program, and PyTorch's error in the same type.
        println!("layer\t{}\t{ours:.2e}\t{theirs:.2e}", layer.name());
        if ours.is_nan() || ours > 2.0 * theirs + 1e-5 {
            wrong.push(format!("{}: {ours:.2e} where PyTorch is off by {theirs:.2e}", layer.name()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A batch of `IMAGES` images `[shape]`, all equal except the last, and the last image alone.
fn large(shape: &[usize]) -> Result<(Tensor, Tensor)> {
    let shape: Vec<usize> = [&[1], shape].concat();
    let random = || Tensor::randn(0f32, 1f32, &shape[..], &Device::Cpu)?.to_dtype(DType::BF16)?.to_device(&device());
    let (first, last) = (random()?, random()?);
    let mut index = vec![0; IMAGES];
    index[IMAGES - 1] = 1;
    Ok((gather(&Tensor::cat(&[&first, &last], 0)?, &index)?, last))
}

const IMAGES: usize = 70;

/// Asserts that an operation gives the same for the last image in a batch as for that image alone.
fn check_large(name: &str, (x, last): (&Tensor, &Tensor), operation: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let (many, alone) = (operation(x)?, operation(last)?);
    let difference = relative(&gather(&many, &[IMAGES as u32 - 1])?, &alone)?;
    let values = many.elem_count().max(x.elem_count());
    println!("large\t{name}\t{values}\t{difference:.1e}");
    assert!(values > u32::MAX as usize, "{name}: {values} values");
    // Libraries may choose another order of summation for a batch. NaN must not pass.
    assert!(difference <= 1e-2, "{name}: {difference}");
    Ok(())
}

#[test]
#[ignore = "takes 60 GB of a GPU"]
fn batches_of_more_values_than_32_bits_can_count_are_right() {
    let small =
        |shape: &[usize]| Tensor::randn(0f32, 0.1f32, shape, &Device::Cpu)?.to_dtype(DType::BF16)?.to_device(&device());
    let run = || -> Result<()> {
        let (x, last) = large(&[256, 256, 1024])?;
        let both = (&x, &last);
        let (weight, bias) = (small(&[1024])?, small(&[1024])?);
        let (group, layer) = (GroupNorm::new(32, 1e-5, &weight, &bias)?, LayerNorm::new(1e-5, &weight, &bias)?);
        check_large("group norm", both, &|x| group.forward(x, true))?;
        check_large("layer norm", both, &|x| layer.forward(x))?;
        check_large("geglu", both, &geglu)?;
        let narrow = Linear::new(&small(&[64, 1024])?, None)?;
        check_large("linear, large input", both, &|x| narrow.forward(x, None))?;
        let conv = Conv2d::new(&small(&[64, 1024, 3, 3])?, None, 1, Padding::Around)?;
        check_large("convolution, large input", both, &|x| conv.forward(x, Fused::default()))?;
        drop((x, last));

        let (x, last) = large(&[256, 256, 64])?;
        let both = (&x, &last);
        let wide = Linear::new(&small(&[1024, 64])?, Some(&bias))?;
        check_large("linear, large output", both, &|x| wide.forward(x, None))?;
        let conv = Conv2d::new(&small(&[1024, 64, 3, 3])?, Some(&bias), 1, Padding::Around)?;
        check_large("convolution, large output", both, &|x| conv.forward(x, Fused::default()))?;
        drop((x, last));

        let (x, last) = large(&[128, 128, 1024])?;
        check_large("upsampling", (&x, &last), &upsample_nearest2x)?;
        drop((x, last));
        let (x, last) = large(&[256, 256, 512])?;
        check_large("concatenation", (&x, &last), &|x| concat_channels(x, Rows::direct(x)))?;
        drop((x, last));
        let (x, last) = large(&[4096, 3 * 80 * 64])?;
        check_large("self-attention", (&x, &last), &|x| self_attention(x, 80, false))
    };
    run().unwrap();
}
