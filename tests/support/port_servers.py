# Servers that code in a session may run, good ones and bad ones. Run in the session's kernel, whose threads go on.
import hashlib, http.server, json, socket, threading, time

seen = {"closed": 0}


def serve(port, answer, host="127.0.0.1"):
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(64)

    def loop():
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=attend, args=(connection,), daemon=True).start()

    def attend(connection):
        try:
            answer(connection, head(connection))
        except OSError:
            pass
        finally:
            connection.close()

    threading.Thread(target=loop, daemon=True).start()


def head(connection):
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            break
        got += piece
    return got


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        digest, length = hashlib.sha256(), 0
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                digest.update(self.rfile.read(size))
                length += size
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                piece = self.rfile.read(min(left, 65536))
                digest.update(piece)
                length, left = length + len(piece), left - len(piece)
        return length, digest.hexdigest()

    def answer(self):
        length, digest = self.body()
        told = {"method": self.command, "path": self.path, "headers": [list(h) for h in self.headers.items()], "length": length, "sha256": digest}
        out = json.dumps(told).encode()
        self.send_response(299 if self.path == "/odd" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        for name, value in [("Set-Cookie", "a=b"), ("Access-Control-Allow-Origin", "*"), ("X-Of-Code", "1")]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(out)

    def do_GET(self):
        if self.path == "/big":
            block = bytes(range(256)) * 4096
            self.send_response(200)
            self.send_header("Content-Length", str(len(block) * 32))
            self.end_headers()
            for _ in range(32):
                self.wfile.write(block)
        elif self.path.startswith("/stream"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for n in range(int(self.path.split("?")[1])):
                    self.wfile.write(b"2\r\n%d\n\r\n" % (n % 10))
                    self.wfile.flush()
                    time.sleep(0.5)
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                seen["closed"] += 1
        else:
            self.answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_HEAD = do_PROPFIND = answer

    def log_message(self, *_):
        pass


class Servers(http.server.ThreadingHTTPServer):
    daemon_threads = True


threading.Thread(target=Servers(("127.0.0.1", 8000), Echo).serve_forever, daemon=True).start()


def bad(connection, head):
    send = connection.sendall
    what = head.split(b" ")[1].decode().rsplit("/", 1)[1]
    if what == "garbage":
        send(b"\x00\xff" * 1000)
    elif what == "closes":
        pass
    elif what == "old":
        send(b"<html>an answer of HTTP/0.9</html>")
    elif what == "status":
        send(b"HTTP/1.1 200 " + b"x" * 1_000_000 + b"\r\n\r\n")
    elif what == "number":
        send(b"HTTP/1.1 99999 OK\r\n\r\n")
    elif what == "headers":
        send(b"HTTP/1.1 200 OK\r\n")
        while True:
            send(b"X-More: 1\r\n" * 1000)
    elif what == "header":
        send(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while True:
            send(b"x" * 10000)
    elif what == "lengths":
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 500\r\n\r\nhello")
    elif what == "both":
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    elif what == "negative":
        send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello")
    elif what == "silent":
        time.sleep(60)
    elif what == "informs":
        while True:
            send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
            time.sleep(0.05)
    elif what == "switches":
        send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        time.sleep(5)
    elif what == "short":
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhello")
    elif what == "chunk":
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello")
    elif what == "second":
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
    elif what == "splits":
        send(b"HTTP/1.1 200 OK\r\nX-A: b\rX-Injected: 1\r\nContent-Length: 0\r\n\r\n")
    elif what == "moves":
        send(b"HTTP/1.1 307 Go\r\nLocation: ../../../../v1/sessions\r\nContent-Length: 0\r\nConnection: X-Own\r\nX-Own: 1\r\n\r\n")
    elif what == "leads":
        send(b"HTTP/1.1 302 Go\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n")


def socket_of_web(connection, head):
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    names = {name.lower(): value for name, value in fields.items()}
    key = names[b"sec-websocket-key"]
    connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + key + b"\r\n\r\n")
    while piece := connection.recv(65536):
        connection.sendall(piece)


serve(8001, bad)
serve(8002, socket_of_web)
serve(8003, lambda c, h: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nsix"), "::1")
serve(9000, bad)
