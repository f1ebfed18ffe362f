r"""FLIQS search, MobileNetV2 on ImageNet.

python -m fliqs_jax.main --workdir=$DIR --config.data.data_dir=$DATA \
    --config=configs/mobilenetv2_imagenet.py:space=int_l,target=1.47

The paper's numbers, not yet measured by us: FLIQS-L at 7.06 GBOPs (target 1.47)
71.73 % top-1, FLIQS-S at 7.42 (1.54) 71.21 % (Figure 17). Floats: E4M3 72.65
(Table 7).

FLIQNAS (section 6) is the same search with `nas`; with one format,
`space=INT8,nas`, only sizes are searched. The paper's numbers, not yet measured
by us: FLIQNAS-L at 13 GBOPs (target 2.7) 74.79 %, at 17 (3.5) 75.65 %;
FLIQNAS-S 73.79 and 75.17 % (Figure 6).

Arguments:
  nas: also search the channels of each stage, 0.5, 1, 1.5 or 2 times, and the
    kernel of each depthwise convolution, 3, 5 or 7. The paper names the open
    layers, but not their options.
  The others: see imagenet.py. The widths of Figures 17 and 23 are 0.25, 0.5, 1,
    1.4 and 2.

Values that the paper does not give: RMSProp's constants, the stairs of the
exponential schedule and the mean of the weights are those of EfficientNet's
code, which follows MnasNet's; weight decay 4e-5, dropout 0.2 and batch norm are
those of TF-Slim's MobileNetV2; random crop and flip are our choice. Base rate
0.256 at batch 2048 is Table 4's, twice EfficientNet's own 0.016 per 256 images.
"""

import ml_collections

from configs import imagenet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Returns the config; see the file's docstring for the arguments."""
  arg = imagenet.parse_arg(arg, nas=False)
  widths, kernels = (0.5, 1.0, 1.5, 2.0), (3, 5, 7)
  smoke_model = dict(width=1 / 8, depth=0.1)
  if arg.nas and arg.smoke:
    # Widths that give different channels, and maps of 4x4 for a 5x5 kernel.
    smoke_model.update(strides=(2, 1, 2, 2, 1, 1, 1, 1))
    widths, kernels = (1.0, 2.0), (3, 5)
  return imagenet.mobile_recipe(
    arg,
    model=dict(
      name='mobilenetv2',
      width=arg.width,
      depth=1.0,
      strides=(2, 1, 2, 2, 2, 1, 2, 1),
      dropout=0.2,
    ),
    smoke_model=smoke_model,
    image_size=224,
    weight_decay=4e-5,
    widths=widths if arg.nas else (),
    kernels=kernels if arg.nas else (),
  )
