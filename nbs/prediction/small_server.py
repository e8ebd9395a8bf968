"""A small server for the notebooks in this folder. It takes half a second to become ready, and fails when its folder
has a file `end`."""
import os, socket, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def a_server(log='server-0.log', **more):
    "What a run says of such a server."
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    return {'command': [sys.executable, str(Path(__file__).absolute()), str(port)], 'env': {},
            'url': f'http://127.0.0.1:{port}/v1', 'log': log, **more}

if __name__ == '__main__':
    time.sleep(.5)
    server = HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not os.path.exists('end'): time.sleep(.05)
    sys.exit('MemoryError: no room\nRuntimeError: engine failed')
