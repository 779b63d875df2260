//! Faults between a client and the server.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

/// A request, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// How many came before it.
    pub number: u64,
    /// `GET` and the like.
    pub method: String,
    /// What it is of: the bucket, the key, and what is behind `?`.
    pub path: String,
    /// Bytes that came with it.
    pub bytes: u64,
}

impl Request {
    /// Whether it is of an object by this key, or by one that begins so.
    pub fn is_of(&self, method: &str, key: &str) -> bool {
        let path = self.path.trim_start_matches('/');
        let of = path
            .strip_prefix(super::BUCKET)
            .map(|path| path.trim_start_matches('/'));
        self.method == method && of.is_some_and(|of| of.starts_with(key))
    }
}

/// What becomes of a request.
pub enum Fault {
    /// It is passed on, and its answer comes back.
    None,
    /// The connection is cut before the server has seen it.
    Cut,
    /// It is done, and the connection is cut before its answer.
    CutAfter,
    /// Of its answer's body so many bytes come, and then the end of the connection.
    Truncated(usize),
    /// In its answer's body this byte is another.
    Wrong(usize),
    /// It is not passed on, and this is the status of its answer.
    Status(u16),
    /// It is not passed on before this has a message, or its other end is gone.
    Held(mpsc::Receiver<()>),
    /// There is never an answer, for as long as the client waits.
    Never,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fault")
    }
}

type Decide = dyn FnMut(&Request) -> Fault + Send;

/// What is between, with an address of its own. Dropping it ends it, and cuts what goes on.
pub struct Faults {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    server: SocketAddr,
    decide: Mutex<Box<Decide>>,
    requests: Mutex<Vec<Request>>,
    open: Mutex<Vec<TcpStream>>,
    is_over: AtomicBool,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Faults {
    /// Between clients and `server`. Of each request, in the order in which they come, `decide` says what becomes.
    ///
    /// # Panics
    /// If it cannot be started: then there is nothing to be tested.
    pub fn start(
        server: SocketAddr,
        decide: impl FnMut(&Request) -> Fault + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Nobody could say when it is over where there is no way to it. It asks for nothing.
        let reached = TcpStream::connect(address);
        drop(reached.expect("the loopback device is up"));
        let shared = Arc::new(Shared {
            server,
            decide: Mutex::new(Box::new(decide)),
            requests: Mutex::default(),
            open: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let mut threads = Vec::new();
                for client in listener.incoming() {
                    if shared.is_over.load(Ordering::SeqCst) {
                        break;
                    }
                    let Ok(client) = client else { continue };
                    let _ = client.set_nodelay(true);
                    lock(&shared.open).extend(client.try_clone());
                    let shared = Arc::clone(&shared);
                    // Whoever hangs up is gone.
                    threads.push(thread::spawn(move || drop(shared.serve(client))));
                }
                for thread in threads {
                    let _ = thread.join();
                }
            }
        });
        Self {
            address,
            shared,
            thread: Some(thread),
        }
    }

    /// Where clients come to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// Has another say what becomes of requests from now on.
    pub fn decide(&self, decide: impl FnMut(&Request) -> Fault + Send + 'static) {
        *lock(&self.shared.decide) = Box::new(decide);
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // What is held is let go.
        self.decide(|_| Fault::Cut);
        // It sees that it is over with the next that comes.
        let _ = TcpStream::connect(self.address);
        for client in lock(&self.shared.open).drain(..) {
            let _ = client.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// One request of a connection: the next needs another.
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(client.try_clone()?);
        let Some((head, body)) = read_request(&mut reader)? else {
            return Ok(());
        };
        let mut words = head.split_whitespace().map(str::to_owned);
        let request = {
            let mut requests = lock(&self.requests);
            let request = Request {
                number: requests.len() as u64,
                method: words.next().unwrap_or_default(),
                path: words.next().unwrap_or_default(),
                bytes: body.len() as u64,
            };
            requests.push(request.clone());
            request
        };
        let fault = lock(&self.decide)(&request);
        match fault {
            Fault::Cut => return client.shutdown(Shutdown::Both),
            Fault::Never => {
                // Until the client has had enough.
                let _ = reader.read(&mut [0]);
                return Ok(());
            }
            Fault::Status(status) => {
                let body =
                    "<Error><Code>Injected</Code><Message>put in by a test</Message></Error>";
                let head = format!(
                    "HTTP/1.1 {status} Injected\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                );
                client.write_all(head.as_bytes())?;
                return client.write_all(body.as_bytes());
            }
            Fault::Held(ref until) => drop(until.recv()),
            Fault::None | Fault::CutAfter | Fault::Truncated(_) | Fault::Wrong(_) => {}
        }
        let mut server = TcpStream::connect(self.server)?;
        // The end of the answer is the end of the connection then.
        let (line, rest) = head.split_once("\r\n").unwrap_or((&head, ""));
        server.set_nodelay(true)?;
        server.write_all(format!("{line}\r\nConnection: close\r\n{rest}").as_bytes())?;
        server.write_all(&body)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        let end_of_head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let body_at = end_of_head.map_or(answer.len(), |at| at + 4);
        match fault {
            Fault::CutAfter => return client.shutdown(Shutdown::Both),
            Fault::Truncated(bytes) => answer.truncate(body_at + bytes),
            Fault::Wrong(at) => {
                if let Some(byte) = answer.get_mut(body_at + at) {
                    *byte ^= 1;
                }
            }
            _ => {}
        }
        client.write_all(&answer)?;
        client.shutdown(Shutdown::Both)
    }
}

/// A request's head, to the empty line, and its body.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<(String, Vec<u8>)>> {
    let (mut head, mut bytes) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let (name, value) = line.split_once(':').unwrap_or_default();
        if name.eq_ignore_ascii_case("content-length") {
            bytes = value.trim().parse().unwrap_or(0);
        }
        let is_end = line == "\r\n";
        // The server's connection is for this one.
        if !name.eq_ignore_ascii_case("connection") {
            head.push_str(&line);
        }
        if is_end {
            break;
        }
    }
    let mut body = vec![0; bytes];
    reader.read_exact(&mut body)?;
    Ok(Some((head, body)))
}
