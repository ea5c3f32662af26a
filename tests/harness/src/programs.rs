//! Real programs: what to type to start them, and how to tell whether they are right.

/// The shell counter, with this pause between two numbers.
pub fn counter(pause: &str) -> [String; 4] {
    let script = format!("i=0; while true; do echo $i; i=$(expr $i + 1); sleep {pause}; done");
    ["busybox".into(), "sh".into(), "-c".into(), script]
}

/// The numbers of a counter's output, one a line; panics at a line that is none. A last line without its end is left out.
#[track_caller]
pub fn numbers(text: &str) -> Vec<u64> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse = |line: &str| line.trim_end().parse().unwrap_or_else(|_| panic!("not a number: {line:?}"));
    whole.lines().filter(|l| !l.trim().is_empty()).map(parse).collect()
}

/// Fails the test unless the numbers count up from the first one, none skipped, none twice.
#[track_caller]
pub fn expect_in_order(numbers: &[u64]) {
    for (i, pair) in numbers.windows(2).enumerate() {
        assert_eq!(pair[1], pair[0] + 1, "after {i} numbers: {pair:?}");
    }
}

/// An HTTP server for node that counts requests, and has timers, a pipe and an eventfd of libuv's at work.
pub const NODE_COUNTER: &str = r"
const http = require('http'), fs = require('fs');
let count = 0, ticks = 0;
setInterval(() => { ticks++; fs.stat('/', () => {}); }, 5);
setInterval(() => { fs.readFile('/etc/passwd', () => {}); }, 50);
http.createServer((req, res) => {
  count++;
  res.setHeader('Connection', 'close');
  res.end(`count ${count} ticks ${ticks}\n`);
}).listen(Number(process.argv[1]), '0.0.0.0', () => console.log('listening'));
";

/// The same for python3.
pub const PYTHON_COUNTER: &str = r"
import sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
count = 0
class Counter(BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        body = ('count %d\n' % count).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)], daemon=True).start()
server = HTTPServer(('0.0.0.0', int(sys.argv[1])), Counter)
print('listening', flush=True)
server.serve_forever()
";

/// Threads, a pool of processes, open files, a pipe to a child and a sleep under way; a line of numbers a round, all of them known
/// beforehand.
pub const PYTHON_BUSY: &str = r"
import hashlib, multiprocessing, os, subprocess, sys, threading, time

def work(n):
    time.sleep(0.002)
    return n * n

def main():
    directory = sys.argv[1]
    lock, counts = threading.Lock(), [0] * 4
    def count(i):
        while True:
            with lock:
                counts[i] += 1
            time.sleep(0.003 * (i + 1))
    for i in range(4):
        threading.Thread(target=count, args=(i,), daemon=True).start()
    slept = []
    def sleeper():
        while True:
            before = time.monotonic()
            time.sleep(0.7)
            slept.append(time.monotonic() - before)
    threading.Thread(target=sleeper, daemon=True).start()

    files = [open(os.path.join(directory, 'py-%d' % i), 'w+b') for i in range(20)]
    child = subprocess.Popen(['/usr/bin/busybox' if os.path.exists('/usr/bin/busybox') else '/bin/busybox', 'cat'],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    digest = hashlib.sha256()
    ballast = [os.urandom(1000) for _ in range(2000)]
    known = hashlib.sha256(b''.join(ballast)).hexdigest()
    with multiprocessing.Pool(3) as pool:
        print('ready', flush=True)
        n = 0
        while not os.path.exists(os.path.join(directory, 'stop')):
            squares = pool.map(work, range(n, n + 6))
            assert squares == [i * i for i in range(n, n + 6)], squares
            for i, f in enumerate(files):
                f.write(b'%d.%d\n' % (n, i))
            line = b'round %d\n' % n
            child.stdin.write(line)
            child.stdin.flush()
            assert child.stdout.readline() == line
            digest.update(line)
            before = list(counts)
            time.sleep(0.01)
            n += 1
            print(n, flush=True)
        deadline = time.monotonic() + 10
        while any(a == b for a, b in zip(before, counts)):
            assert time.monotonic() < deadline, 'a thread stands still'
            time.sleep(0.01)
        for i, f in enumerate(files):
            f.flush()
            f.seek(0)
            assert f.read() == b''.join(b'%d.%d\n' % (m, i) for m in range(n)), 'file %d' % i
        expected = hashlib.sha256(b''.join(b'round %d\n' % m for m in range(n))).hexdigest()
        assert digest.hexdigest() == expected
        assert hashlib.sha256(b''.join(ballast)).hexdigest() == known
        assert all(s >= 0.699 for s in slept), slept
        assert all(s < 0.7 + 1.5 for s in slept), slept
    # Only now: the workers of the pool hold the pipe too.
    child.stdin.close()
    assert child.wait() == 0
    with open(os.path.join(directory, 'verdict'), 'w') as f:
        f.write('ok\n')

if __name__ == '__main__':
    try:
        main()
    except BaseException:
        import traceback
        with open(os.path.join(sys.argv[1], 'verdict'), 'w') as f:
            traceback.print_exc(file=f)
        raise
";
