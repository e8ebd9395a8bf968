"""What has changed for those who import the package: python nbs/benchmarks/interface.py BEFORE [AFTER]

Compares, between two revisions, the names of `qwen2vl_nb.all` with their signatures, the files of the package, the
number of messages (exceptions, warnings, findings), and the time that the import takes."""
import json, subprocess, sys, tempfile

ASK = '''
import ast, inspect, json, subprocess, sys
from pathlib import Path
import qwen2vl_nb
folder = Path(qwen2vl_nb.__file__).parent
names = {}
exec('from qwen2vl_nb.all import *', names)
def signature(thing):
    try: return str(inspect.signature(thing))
    except (TypeError, ValueError): return ''
trees = [ast.parse(path.read_text()) for path in folder.rglob('*.py')]
calls = [n.func for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
said = [f.id if isinstance(f, ast.Name) else getattr(f, 'attr', '') for f in calls]
import_alone = 'import time; t = time.process_time(); import qwen2vl_nb.all; print(time.process_time() - t)'
times = [float(subprocess.check_output([sys.executable, '-c', import_alone], text=True)) for _ in range(5)]
print(json.dumps({
    'names': {name: signature(thing) for name, thing in names.items() if not name.startswith('__')},
    'files': sorted(str(p.relative_to(folder)) for p in folder.rglob('*.py*') if '__pycache__' not in p.parts),
    'messages': sum(name in ('Finding', 'Fault', 'warn') or name.endswith('Error') for name in said),
    'seconds': min(times)}))
'''

def described(revision, folder):
    "What the package offers at a revision."
    archive = subprocess.Popen(['git', 'archive', revision, 'qwen2vl_nb'], stdout=subprocess.PIPE)
    subprocess.run(['tar', '-x', '-C', folder], stdin=archive.stdout, check=True)
    return json.loads(subprocess.check_output([sys.executable, '-c', ASK], text=True, cwd=folder,
                                              env={'PYTHONPATH': folder}))

def main(before, after='HEAD'):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        old, new = described(before, one), described(after, two)
    for what in ('names', 'files'):
        a, b = old[what], new[what]
        print(f'{what}: {len(a)} before, {len(b)} now; gone: {sorted({*a} - {*b}) or "none"}; new: '
              f'{sorted({*b} - {*a}) or "none"}')
    for name in old['names'].keys() & new['names'].keys():
        if old['names'][name] != new['names'][name]: print(f'{name}{old["names"][name]}\n-> {new["names"][name]}')
    print(f'messages: {old["messages"]} before, {new["messages"]} now')
    print(f'import qwen2vl_nb.all: {old["seconds"]:.2f} s before, {new["seconds"]:.2f} s now, of the processor')

if __name__ == '__main__': main(*sys.argv[1:])
