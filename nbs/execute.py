"""Execute notebooks in place, with what they print shown as they go: python nbs/execute.py [--flags tiny] NOTEBOOK …

Cells that carry a flag of settings.ini other than `slow`, such as `#| gpu`, are left as they are unless the flag is
named."""
import argparse, re, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAGS = {'gpu', 'tiny'}

class ShownClient(NotebookClient):
    "Runs a notebook, shows its headings and what it prints, and leaves cells with other flags out."
    def __init__(self, nb, folder, flags=()):
        super().__init__(nb, timeout=None, kernel_name='python3', store_widget_state=False, coalesce_streams=True,
                         extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': folder}})
        self.left_out, self.began = FLAGS - set(flags), time.time()

    def process_message(self, msg, cell, cell_index):
        if msg['msg_type'] == 'stream': print(msg['content']['text'], end='', flush=True)
        return super().process_message(msg, cell, cell_index)

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        for heading in re.findall(r'^## (.*)', cell.source if cell.cell_type == 'markdown' else '', re.M):
            print(f'\n{time.time() - self.began:4.0f} s  {heading}', flush=True)
        if self.left_out & set(re.findall(r'^#\| *(\w+) *$', cell.source, re.M)): return cell
        cell = await super().async_execute_cell(cell, cell_index, **kwargs)
        if '#| hide' in cell.source and cell.cell_type == 'code': cell.outputs = []
        for output in cell.get('outputs', []):  # a widget lives as long as its kernel; what is kept is its text
            output.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
        return cell

def execute(
    path, # Notebook to run, in its own folder
    output, # File to write it to, also where a cell fails
    flags=(), # Flags whose cells are run
):
    "Execute a notebook."
    nb = nbformat.read(path, as_version=4)
    try: ShownClient(nb, Path(path).parent, flags).execute()
    finally: nbformat.write(nb, output)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', nargs='*', default=[])
    parser.add_argument('notebooks', nargs='+')
    asked = parser.parse_args()
    for path in asked.notebooks:
        print(f'\n=== {path}')
        execute(path, path, asked.flags)
