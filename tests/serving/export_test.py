"""A finished run as files: small, served bit for bit, damage always named."""

import hashlib
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import scipy.stats

from fliqs_jax import export
from fliqs_jax.numerics import formats
from fliqs_jax.numerics import packing
from fliqs_jax.run import evaluation
from fliqs_jax.run import train
from fliqs_jax.runtime import devices as devices_lib
from fliqs_jax.serving import export_files
from fliqs_jax.serving import loader
from tests import tiny

pytestmark = pytest.mark.slow

_FILES = (
  'manifest.json',
  'weights.safetensors',
  'reference.safetensors',
  'unpack.stablehlo',
  'model.stablehlo',
  'unpack.vnni.stablehlo',
  'model.vnni.stablehlo',
  'qwix.json',
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """The workdir of a finished run, of more formats than the named spaces."""
  config = tiny.get_config('steps=20')
  with config.unlocked(), config.ignore_type():
    config.quant.formats = ('INT3', 'INT5', 'INT8', 'E2M1', 'E4M3', 'E6M1')
    config.cost.target = 2.0
  path = tmp_path_factory.mktemp('run')
  train.train_and_evaluate(config, path)
  return path


@pytest.fixture(scope='module')
def exported(workdir, tmp_path_factory):
  """An export: INT5 in the first layer, E4M3 in the second."""
  path = tmp_path_factory.mktemp('exports')
  arch = json.loads((workdir / 'arch.json').read_text())
  for layer, name in (('hidden0', 'INT5'), ('head', 'E4M3')):
    arch['layers'][layer] = dict(weights=name, activations=name)
  (path / 'arch.json').write_text(json.dumps(arch))
  export.export(workdir, path / 'out', arch=str(path / 'arch.json'))
  return path / 'out'


@pytest.fixture
def copy(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported, tmp_path / 'copy'))


def test_weights_are_stored_in_their_bits_and_as_nothing_else(exported):
  content = export_files.read(exported)
  # 64 pixels and 16 hidden units, ten classes: 1024 codes of 5 bits, 160 of 8.
  expected = {
    'params/hidden0/weights': ('uint8', 1024 * 5 // 8),
    'params/head/weights': ('uint8', 160),
    'variables/params/hidden0/bias': ('float32', 4 * 16),
    'variables/params/head/bias': ('float32', 4 * 10),
    'scales/hidden0/weights': ('float32', 4 * 16),
    'scales/head/weights': ('float32', 4 * 10),
    'scales/hidden0/activations': ('float32', 4),
    'scales/head/activations': ('float32', 4),
  }
  found = {k: (x.dtype.name, x.nbytes) for k, x in content.tensors.items()}
  assert found == expected
  size = content.manifest['bytes']
  assert size['stored'] == sum(nbytes for _, nbytes in expected.values())
  # After entropy coding the codes take their entropy, as SciPy has it.
  coded = size['stored']
  for layer, bits, shape in (('hidden0', 5, (64, 16)), ('head', 8, (16, 10))):
    stored = content.tensors[f'params/{layer}/weights']
    codes = packing.decode(stored, formats.parse(f'INT{bits}'), shape)
    _, counts = np.unique(codes, return_counts=True)
    entropy = scipy.stats.entropy(counts, base=2) * codes.size
    coded += math.ceil(entropy / 8) - stored.nbytes
  assert size['compressed'] == coded < size['stored']
  # Of the float32 model, which has no scales.
  assert size['float32'] == 4 * (64 * 16 + 16 + 16 * 10 + 10)


def test_no_path_of_this_machine_is_in_an_export(exported):
  for path in exported.iterdir():
    content = path.read_bytes()
    for name in (b'.py', str(pathlib.Path(__file__).parents[2]).encode()):
      assert name not in content, path.name


def test_the_export_is_the_evaluated_model_bit_for_bit(workdir, exported):
  found = export.verify(exported)
  assert found['bit_equal']
  assert found['examples'] == 8
  # And not only on the stored examples: the whole test split.
  run = evaluation.restore(str(workdir))
  choices = evaluation.choose(run, str(exported.parent / 'arch.json'))
  variables = dict(
    params=run.state.served_params,
    arch=run.experiment.space.expand(choices),
    **evaluation.served(
      run.experiment,
      run.state,
      choices,
      devices_lib.one_device(run.experiment.config),
    ).statistics,
  )
  apply = jax.jit(lambda v, x: run.experiment.model.apply(v, x, train=False))
  # In one piece: a sum of floats may depend on the size of the batch.
  served = loader.load(exported, at_once=10**6)
  sliced = loader.load(exported, at_once=50)
  for batch in run.experiment.streams.test():
    np.testing.assert_array_equal(
      served(batch['image']), apply(variables, batch['image'])
    )
    np.testing.assert_allclose(
      sliced(batch['image']), served(batch['image']), atol=1e-6
    )


def test_the_found_architecture_is_what_is_exported(workdir, tmp_path, capsys):
  out = tmp_path / 'new' / 'out'
  assert export.main([str(workdir), f'--out={out}']) == 0
  assert json.loads(capsys.readouterr().out)['reference']['bit_equal']
  arch = json.loads((workdir / 'arch.json').read_text())
  layers = export_files.read_manifest(out)['layers']
  for path, sides in arch['layers'].items():
    assert {side: layers[path][side] for side in sides} == sides
  assert sorted(p.name for p in out.iterdir()) == sorted(_FILES)
  assert export.main(['--verify', str(out)]) == 0


def test_a_kill_while_writing_leaves_no_export(exported, tmp_path, monkeypatch):
  content = export_files.read(exported)
  out = tmp_path / 'out'

  def killed(path, value):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(export_files.files, 'write_json', killed)
    with pytest.raises(KeyboardInterrupt):
      export_files.write(out, {}, content.layers, content.tensors, {})
  assert not out.exists()
  # What it left is in nobody's way.
  export_files.write(out, {}, content.layers, content.tensors, {})
  assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_directory_in_use_is_refused(workdir, exported):
  with pytest.raises(ValueError, match='is not empty'):
    export.export(workdir, exported)


def test_an_unfinished_run_is_refused(tmp_path, workdir):
  unfinished = tmp_path / 'run'
  unfinished.mkdir()
  shutil.copy(workdir / 'config.json', unfinished)
  with pytest.raises(ValueError, match='at step 0 of 20; finish it first'):
    export.export(unfinished, tmp_path / 'out')
  with pytest.raises(ValueError, match='is no workdir of a run'):
    export.export(tmp_path / 'nothing', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_format_without_a_native_type_names_the_nearest(workdir, tmp_path):
  for name, nearest in (('INT5', 'INT8'), ('E6M1', 'BF16')):
    with pytest.raises(
      ValueError,
      match=f'no native type holds {name}, the weights of hidden0; the '
      f'nearest format that has one is {nearest}',
    ):
      export.export(
        workdir, tmp_path / 'out', numeric_format=name, target='native'
      )


def test_mistakes_end_in_one_line_and_status_2(workdir, exported, capsys):
  for arguments in (
    [str(workdir), f'--out={exported}'],
    [str(workdir), f'--out={exported}-2', '--format=INT7'],
    ['--verify', str(workdir)],
  ):
    assert export.main(arguments) == 2
    written = capsys.readouterr()
    assert len(written.err.splitlines()) == 1
    assert not written.out


@pytest.mark.parametrize('name', _FILES)
def test_any_flipped_bit_and_any_truncation_is_named(copy, name):
  path = copy / name
  data = path.read_bytes()
  rng = np.random.default_rng(len(name))
  for position in rng.integers(0, 8 * len(data), 40):
    flipped = bytearray(data)
    flipped[position // 8] ^= 1 << (position % 8)
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=name):
      export_files.read(copy)
  for length in (0, 1, 8, len(data) // 2, len(data) - 2):
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match=name):
      export_files.read(copy)
  path.unlink()
  with pytest.raises(ValueError, match=name):
    export_files.read(copy)


def test_an_edited_manifest_is_noticed(copy):
  manifest = export_files.read_manifest(copy)
  manifest['layers']['head']['weights'] = 'INT8'
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='was edited or damaged'):
    export.verify(copy)
  # With a new checksum the layer does not fit what is stored of it.
  manifest['checksum'] = export_files.checksum(manifest)
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='layer head contradicts its formats'):
    export.verify(copy)


_GONE = object()


def _forged(manifest, value):
  """Yields the manifest with a value at each place, and the new checksum."""
  for changed in _changed(manifest, value):
    yield changed | dict(checksum=export_files.checksum(changed))


def _changed(tree, value):
  for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
    copy = tree.copy()
    if value is _GONE:
      copy.pop(key)
    else:
      copy[key] = value
    yield copy
    if isinstance(tree[key], (dict, list)):
      for inner in _changed(tree[key], value):
        copy = tree.copy()
        copy[key] = inner
        yield copy


def _refusals(directory, forged, check):
  """Returns the messages of what is refused; the rest makes no difference."""
  messages = []
  for manifest in forged:
    (directory / 'manifest.json').write_text(json.dumps(manifest))
    try:
      check(directory)
    except ValueError as error:
      messages.append(str(error).strip())
  return messages


@pytest.mark.parametrize('value', [_GONE, None, 'x', 3, -1, [], {}, [[]]])
def test_a_forged_manifest_is_read_or_refused(copy, value):
  """Its checksum is no signature, so nothing of it is trusted."""
  forged = _forged(export_files.read_manifest(copy), value)
  messages = _refusals(copy, forged, export_files.read)
  assert len(messages) > 30
  assert all('\n' not in message for message in messages)


@pytest.mark.parametrize('key', ['program', 'keys', 'inputs', 'outputs'])
@pytest.mark.parametrize('value', [_GONE, 'x'])
def test_a_forged_description_is_used_or_refused(copy, key, value):
  manifest = export_files.read_manifest(copy)
  parts = _changed({key: manifest.pop(key)}, value)
  forged = (
    dict(f, checksum=export_files.checksum(f))
    for f in (manifest | part for part in parts)
  )
  assert _refusals(copy, forged, export.verify)


def test_a_file_beside_an_export_is_none_of_it(copy):
  manifest = export_files.read_manifest(copy)
  (copy.parent / 'beside').write_bytes(b'')
  digest = hashlib.sha256(b'').hexdigest()
  manifest['files']['../beside'] = dict(bytes=0, sha256=digest)
  manifest['checksum'] = export_files.checksum(manifest)
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="'../beside' is no name of a file"):
    export_files.read(copy)


def test_a_program_that_is_none_is_refused(copy):
  manifest = export_files.read_manifest(copy)
  for name in manifest['files']:
    if name.endswith('.stablehlo'):
      (copy / name).write_bytes(b'no program')
      digest = hashlib.sha256(b'no program').hexdigest()
      manifest['files'][name] = dict(bytes=10, sha256=digest)
  manifest['checksum'] = export_files.checksum(manifest)
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='a program of the export cannot be'):
    export.verify(copy)


def test_other_outputs_are_noticed(exported, tmp_path):
  content = export_files.read(exported)
  reference = export_files.read_tensors(
    exported, content.manifest, export_files.REFERENCE
  )
  reference['outputs'] = reference['outputs'] + 1
  added = ('layers', 'tensors', 'files', 'bytes', 'checksum', 'schema')
  manifest = {k: v for k, v in content.manifest.items() if k not in added}
  programs = {
    name: (exported / name).read_bytes()
    for name in _FILES
    if name.endswith('.stablehlo')
  }
  export_files.write(
    tmp_path / 'out',
    manifest,
    content.layers,
    content.tensors,
    {export_files.REFERENCE: export_files.packed_file(reference), **programs},
  )
  with pytest.raises(ValueError, match='differ from the reference outputs by'):
    export.verify(tmp_path / 'out')
