"""The studies: which settings are trained, and what the paper measured."""

from fliqs_jax.analyses import study as study_lib

# The paper's numbers are top-1 on ImageNet, in percent.
_FLOATS = ('E1M6', 'E2M5', 'E3M4', 'E4M3', 'E5M2')
# Table 10a: start of activation quantization, in steps of 30,200.
_STARTS = {
  1000: 75.59,
  2000: 75.59,
  4000: 76.11,
  6000: 76.05,
  8000: 76.02,
  10000: 76.03,
  15000: 75.94,
  20000: 75.93,
  25000: 75.54,
  30000: 74.19,
}
_STEPS = 30_200
# Table 10b: clip of activations, in standard deviations.
_CLIPS = {
  '1': 63.39,
  '2': 67.79,
  '3': 68.02,
  '4': 67.91,
  '5': 67.19,
  '6': 67.00,
  '7': 66.15,
  '8': 64.91,
}
_BETAS = ('0.01', '0.05', '0.1', '0.5', '1')
_SCHEDULES = ('constant', 'linear', 'cosine')


def _fraction(step: int, least: float = 0) -> str:
  return f'{max(step / _STEPS, least):.3f}'


def _against(base: str, *others: str):
  """Returns the pairs of points of which verdicts speak."""
  return tuple(((other, ''), (base, '')) for other in others)


_MANTISSA = study_lib.Study(
  title='Mantissa sweep',
  text=(
    'Uniform floats of 8 bits, from 6 to 2 bits of mantissa (Table 7).',
    'The paper: the more mantissa the better, most of all for MobileNetV2, '
    'whose layers are depthwise.',
  ),
  runs=[dict(arguments=dict(space=list(_FLOATS)))],
  varied='space',
  heading='format',
  base='E1M6',
  paper={
    'ResNet-18': dict(zip(_FLOATS, (71.72, 71.70, 71.69, 71.69, 71.59))),
    'ResNet-50': dict(zip(_FLOATS, (77.80, 77.74, 77.55, 77.66, 76.90))),
    'MobileNetV2': dict(zip(_FLOATS, (73.20, 73.14, 73.17, 72.65, 72.07))),
    'InceptionV3': dict(zip(_FLOATS, (76.53, 76.36, 76.48, 76.30, 76.15))),
  },
  quoted=_against('E1M6', 'E4M3', 'E5M2'),
)

_ENTROPY = study_lib.Study(
  title='Entropy schedules',
  text=(
    'Weight and schedule of the entropy in the policy gradient (Figure 4b).',
    'Searches at one cost target, with the published controller, and uniform '
    'networks; quality is judged at equal cost, because a schedule changes '
    'what the found network costs. Off is a weight of 0 at every schedule.',
    'The paper’s tables with and without the cosine schedule (Figures 15 to '
    '17): +.14 points for ResNet-18, +.29 for ResNet-50, -.02 for MobileNetV2 '
    'on average over widths, at 2 to 4 % more cost.',
  ),
  arguments=dict(space='int_l', preset='paper'),
  runs=[
    dict(
      overrides={
        'search.entropy_beta': ['0'],
        'search.entropy_schedule': ['off'],
      }
    ),
    dict(
      overrides={
        'search.entropy_beta': list(_BETAS),
        'search.entropy_schedule': list(_SCHEDULES),
      }
    ),
    dict(arguments=dict(space=['INT4', 'INT5', 'INT6', 'INT8'])),
  ],
  varied='search.entropy_beta',
  series='search.entropy_schedule',
  heading='weight of the entropy',
  quoted=tuple((('0.5', kind), ('0', 'off')) for kind in _SCHEDULES),
)

_ACTIVATION_START = study_lib.Study(
  title='Start of activation quantization',
  text=(
    'When activations begin to be quantized, of uniform INT4 (Table 10a).',
    'The paper, on a ResNet-50: best at 13 % of training, flat from 13 to '
    '66 %, two points worse at 99 %.',
  ),
  arguments=dict(space='INT4'),
  # A search must not start before; a uniform network has none.
  runs=[
    dict(
      overrides={
        'quant.act_start': [_fraction(step)],
        'search.start': _fraction(step, 0.25),
        'search.freeze': '1.0',
      }
    )
    for step in _STARTS
  ],
  varied='quant.act_start',
  heading='start, fraction of training',
  base=_fraction(4000),
  paper={'ResNet-50': {_fraction(s): top1 for s, top1 in _STARTS.items()}},
  quoted=_against(
    _fraction(4000), _fraction(1000), _fraction(20000), _fraction(30000)
  ),
)

_CLIP_MULTIPLE = study_lib.Study(
  title='Clip multiple',
  text=(
    'The clip of activations as a multiple of their deviation (Table 10b).',
    'Of uniform INT4, as the numbers of the paper’s ResNet-18 suggest; the '
    'paper does not name the format. The paper: best at 3 to 4.',
  ),
  arguments=dict(space='INT4'),
  runs=[
    dict(
      overrides={
        'quant.act_threshold': 'deviation',
        'quant.act_clip': list(_CLIPS),
      }
    )
  ],
  varied='quant.act_clip',
  heading='standard deviations',
  base='4',
  paper={'ResNet-18': _CLIPS},
  quoted=_against('4', '1', '3', '8'),
)

_RETRAINING = study_lib.Study(
  title='Retraining',
  text=(
    'A served network beside the same one trained from the beginning (A.11).',
    'Paired by seed. The paper, of one run each of a ResNet-18 of six widths: '
    'no advantage of retraining; its numbers here are served minus retrained.',
  ),
  runs=[dict(arguments=dict(space=['int_s', 'int_l']))],
  varied='space',
  heading='space',
  paper={
    f'width {width}': dict(int_s=small, int_l=large)
    for width, small, large in (
      ('0.5', 0.08, 0.01),
      ('0.75', -1.54, -0.11),
      ('1', 0.39, 0.0),
      ('1.25', 0.31, 0.03),
      ('1.5', 0.12, 0.10),
      ('2', 0.11, 0.05),
    )
  },
  retrained=True,
)

STUDIES: dict[str, study_lib.Study] = {
  'mantissa': _MANTISSA,
  'entropy': _ENTROPY,
  'activation_start': _ACTIVATION_START,
  'clip_multiple': _CLIP_MULTIPLE,
  'retraining': _RETRAINING,
}
