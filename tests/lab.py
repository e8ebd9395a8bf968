"JupyterLab in a browser, as tests drive it."
import json, os, secrets, subprocess, sys, urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil

from conftest import KEPT, free_ports, until
from qwen2vl_nb.run.start import attach

def notebook(path, cells):
    kernel = dict(name='python3', display_name='python3', language='python')
    cells = [dict(cell_type='code', id=f'cell-{i}', execution_count=None, metadata={}, outputs=[], source=c) for i,c in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))

def setting(folder, plugin, **values):
    path = folder/f'{plugin}.jupyterlab-settings'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))

def is_up(url):
    try: return urllib.request.urlopen(f'{url}/api', timeout=60).status == 200
    except OSError: return False

@contextmanager
def running_lab(root):
    "JupyterLab on a folder, with settings of its own: url and token, folder and process."
    own = {f'JUPYTER_{k}_DIR': str(root/'.jupyter'/k) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= {f'JUPYTERLAB_{k}_DIR': str(root/'.jupyter'/k) for k in ('SETTINGS', 'WORKSPACES')} | {'IPYTHONDIR': str(root/'.ipython')}
    settings = Path(own['JUPYTERLAB_SETTINGS_DIR'])
    setting(settings, '@jupyterlab/notebook-extension/tracker', windowingMode='none')  # or what is out of sight is not there
    setting(settings, '@jupyterlab/apputils-extension/notification', checkForUpdates=False, fetchNews='false')
    port, = free_ports(1)
    url, token = f'http://127.0.0.1:{port}', secrets.token_hex()
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={root}']
    with open(root/'lab.log', 'w') as log:
        env = os.environ | own | {'RUN_FOLDER': str(root/'runs'/'browser'), 'OMP_NUM_THREADS': '1', 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
        process = psutil.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until(lambda: is_up(url) or process.poll() is not None, 'JupyterLab starts')
        assert process.poll() is None, (root/'lab.log').read_text()[-2000:]
        yield SimpleNamespace(url=url, token=token, root=root, process=process)
    finally:
        for r in root.rglob('run.json'): attach(r.parent).stop(patience=0)
        kernels = process.children(recursive=True)
        process.terminate()
        for p in psutil.wait_procs([process, *kernels], timeout=60)[1]: p.kill()

def menu(page, menu, *items):
    page.get_by_role('menuitem', name=menu, exact=True).click()
    for i in items: page.locator('.lm-Menu-itemLabel').get_by_text(i, exact=True).click()

def idle(page): page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()

def open_notebook(page, lab, path):
    page.goto(f'{lab.url}/lab/tree/{path}?reset&token={lab.token}')
    page.locator('.jp-Notebook').wait_for()
    idle(page)

def reload_page(page, notebook):
    "Save the notebook, and load the page again."
    saved = notebook.stat().st_mtime_ns
    page.keyboard.press('Control+s')
    until(lambda: notebook.stat().st_mtime_ns > saved, 'the notebook is saved')
    page.reload()
    page.locator('.jp-Notebook').wait_for()

def keep(page, name):
    page.locator('.widget-vbox').first.scroll_into_view_if_needed()
    page.screenshot(path=KEPT/f'{name}.png')

def contrast(element):
    "How much lighter the lighter one of an element's text and background is."
    luminance = """rgb => rgb.map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((sum, v, i) => sum + v*[.2126, .7152, .0722][i], 0)"""
    script = """e => {
        const luminance = LUMINANCE, numbers = text => text.match(/[\\d.]+/g).map(Number)
        let behind = e
        while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) == 0) behind = behind.parentElement
        const [a, b] = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor].map(c => luminance(numbers(c).slice(0, 3)))
        return (Math.max(a, b) + .05)/(Math.min(a, b) + .05)
    }""".replace('LUMINANCE', luminance)
    return element.evaluate(script)

