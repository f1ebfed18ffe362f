"""Formats: how they are spelt, what they can represent, the named spaces."""

import pytest

from fliqs_jax.numerics import formats

FLOATS = [
  (exponent_bits, bits - 1 - exponent_bits)
  for bits in range(4, 9)
  for exponent_bits in range(1, bits)
]


@pytest.mark.parametrize('bits', range(2, 9))
def test_an_integer_of_k_bits_is_symmetric_with_a_step_of_one(bits):
  fmt = formats.parse(f'INT{bits}')
  # One code of 2**k is given up for symmetry: INT4 holds -7..7.
  assert fmt.max_value == 2 ** (bits - 1) - 1
  # Below 2**min_exponent the step is constant; that must reach max_value.
  assert 2 * 2.0**fmt.min_exponent > fmt.max_value
  assert fmt.min_exponent - fmt.mantissa_bits == 0
  assert (fmt.name, fmt.bits, fmt.scaled) == (f'INT{bits}', bits, True)


def test_there_are_25_floats_of_4_to_8_bits():
  # x + y + 1 = b has b - 1 solutions with x >= 1, y >= 0: 3 + 4 + 5 + 6 + 7.
  assert len(FLOATS) == 25


@pytest.mark.parametrize(('exponent_bits', 'mantissa_bits'), FLOATS)
def test_a_float_has_symmetric_exponents_and_only_finite_codes(
  exponent_bits, mantissa_bits
):
  fmt = formats.parse(f'E{exponent_bits}M{mantissa_bits}')
  assert fmt.bits == 1 + exponent_bits + mantissa_bits
  assert fmt.mantissa_bits == mantissa_bits
  assert fmt.scaled
  # A.5: the bias puts zero in the middle, the lower one of 2**x exponents;
  # field 0 is subnormal and shares the exponent of field 1.
  bias = 2 ** (exponent_bits - 1) - 1
  assert fmt.min_exponent == 1 - bias
  # The largest code has all bits set: no code is an infinity or a NaN.
  all_ones = 2**exponent_bits - 1
  significand = 1 + (2**mantissa_bits - 1) / 2**mantissa_bits
  assert fmt.max_value == significand * 2.0 ** (all_ones - bias)


@pytest.mark.parametrize(
  ('name', 'max_value', 'smallest'),
  [
    ('E2M1', 6.0, 0.5),  # OCP MX E2M1: 0.5 to 6.
    ('E3M2', 28.0, 0.0625),  # OCP MX E3M2.
    ('E4M3', 480.0, 2.0**-9),  # OCP's 448 is one code less: that one is NaN.
    ('E1M2', 3.5, 0.5),  # 0, 0.5, ..., 3.5: INT4 in halves.
    ('E7M0', 2.0**64, 2.0**-62),  # Exponents -62 to 64.
    ('BF16', 255 * 2.0**120, 2.0**-126),
  ],
)
def test_the_largest_and_the_smallest_value(name, max_value, smallest):
  fmt = formats.parse(name)
  assert fmt.max_value == max_value
  assert 2.0 ** (fmt.min_exponent - fmt.mantissa_bits) == smallest


def test_bf16_is_the_only_format_without_a_scale():
  assert formats.parse('bf16') is formats.BF16
  assert (formats.BF16.bits, formats.BF16.mantissa_bits) == (16, 7)
  assert not formats.BF16.scaled


@pytest.mark.parametrize(
  ('text', 'name'),
  [
    ('int4', 'INT4'),
    ('Int8', 'INT8'),
    (' INT2 ', 'INT2'),
    ('e4m3', 'E4M3'),
    ('E4m3', 'E4M3'),
    ('bf16', 'BF16'),
    ('Bf16', 'BF16'),
  ],
)
def test_case_does_not_matter_and_the_name_is_canonical(text, name):
  fmt = formats.parse(text)
  assert str(fmt) == fmt.name == name
  assert fmt == formats.parse(name)
  assert formats.parse(fmt) is fmt


@pytest.mark.parametrize(
  'name',
  [
    'INT1',
    'INT9',
    'INT16',
    'UINT8',
    'FP8',
    'FP16',
    'E0M3',  # No exponent bit.
    'E8M3',  # 12 bits.
    'E4M4',  # 9 bits.
    'E1M1',  # 3 bits.
    'E4M3FN',
    'XE4M3',
    'E10M1',
    '',
    None,
    4,
  ],
)
def test_an_unknown_format_is_an_error_that_says_what_is_allowed(name):
  with pytest.raises(ValueError, match=r'unknown format .*INT2 to INT8, ExMy'):
    formats.parse(name)


@pytest.mark.parametrize(
  ('space', 'names'),
  [
    # Table 5, word for word.
    ('int_s', 'INT4, INT8, BF16'),
    ('int_l', 'INT4, INT5, INT6, INT7, INT8, BF16'),
    ('fp_s', 'E2M1, E4M3, BF16'),
    (
      'fp_l',
      'E2M1, E2M2, E2M3, E2M4, E2M5, E3M1, E3M2, E3M3, E3M4, E4M1, E4M2, '
      'E4M3, E5M1, E5M2, E6M1, BF16',
    ),
  ],
)
def test_named_spaces_are_those_of_table_5(space, names):
  assert [str(fmt) for fmt in formats.menu(space)] == names.split(', ')


def test_there_are_four_named_spaces():
  assert sorted(formats.SPACES) == ['fp_l', 'fp_s', 'int_l', 'int_s']


def test_a_menu_keeps_the_order_it_is_given_in():
  menu = formats.menu(['bf16', 'e2m1', formats.parse('INT3')])
  assert [fmt.name for fmt in menu] == ['BF16', 'E2M1', 'INT3']


@pytest.mark.parametrize('only', ['int8', formats.parse('INT8'), ['INT8']])
def test_one_format_is_a_menu_of_one(only):
  assert formats.menu(only) == (formats.parse('INT8'),)


@pytest.mark.parametrize('formats_', [[], ()])
def test_an_empty_menu_is_an_error(formats_):
  with pytest.raises(ValueError, match='menu of formats is empty'):
    formats.menu(formats_)


@pytest.mark.parametrize('names', [['INT4', 'int4'], ['e4m3', 'bf16', 'E4M3']])
def test_a_format_named_twice_is_an_error(names):
  with pytest.raises(ValueError, match='names a format twice'):
    formats.menu(names)


def test_an_unknown_space_is_an_error_that_lists_the_spaces():
  with pytest.raises(ValueError, match='int_s, int_l, fp_s, fp_l'):
    formats.menu('int_m')


def test_spaces_and_formats_are_joined_by_a_plus():
  joined = formats.menu('int_s+fp_s')
  names = [f.name for f in joined]
  # BF16, which both have, counts once.
  assert names == ['INT4', 'INT8', 'BF16', 'E2M1', 'E4M3']
  assert formats.menu('INT4 + INT8') == formats.menu(('INT4', 'INT8'))
  with pytest.raises(ValueError, match='names a format twice'):
    formats.menu('INT4+INT4')
  with pytest.raises(ValueError, match='names a format twice'):
    formats.menu('int_s+INT4')
  with pytest.raises(ValueError, match="unknown format ''"):
    formats.menu('INT4+')


def test_an_unknown_format_within_a_menu_is_an_error():
  with pytest.raises(ValueError, match="unknown format 'INT9'"):
    formats.menu(['INT4', 'INT9'])
