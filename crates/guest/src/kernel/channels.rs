//! The connections to a kernel's five ports: dialling, reading and writing. What a message means is judged elsewhere.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpSocket, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::launch::Endpoint;
use super::outbox::{Outbox, Port};
use crate::zmtp::{
    FrameDecoder, Item, SocketType, ZmtpError, answer_command, end_of_file, message_chunks, shake_hands,
};

const POLL: Duration = Duration::from_millis(3);
const BEAT: Duration = Duration::from_secs(10);
/// How long the first message of iopub, proof of the subscription, is waited for; not every kernel sends one.
const WELCOME: Duration = Duration::from_millis(50);
const READ: usize = 32 * 1024;
const MAX_ECHO: u64 = 1024;

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

type Reader = ReadHalf<Box<dyn Duplex>>;
type Writer = WriteHalf<Box<dyn Duplex>>;

/// A connection after its handshake.
pub struct Connection {
    port: Port,
    reader: Reader,
    writer: Writer,
    early: BytesMut,
}

/// A port and why it is of no use.
pub type Broken = (Port, ZmtpError);

/// Connects all five ports, and proves the heartbeat.
///
/// # Errors
/// With the port that did not answer by `deadline`, or that is no ZeroMQ port.
pub async fn connect_all(
    endpoints: &[Endpoint; 5],
    identity: &[u8],
    deadline: Instant,
) -> Result<Vec<Connection>, Broken> {
    let connections = Port::ALL.into_iter().zip(endpoints).map(|(port, endpoint)| async move {
        establish(port, endpoint, identity, deadline).await.map_err(|error| (port, error))
    });
    futures_util::future::try_join_all(connections).await
}

async fn establish(
    port: Port,
    endpoint: &Endpoint,
    identity: &[u8],
    deadline: Instant,
) -> Result<Connection, ZmtpError> {
    let in_time = |what| move |_| ZmtpError::Silent(what);
    let mut stream = tokio::time::timeout_at(deadline, dial(endpoint)).await.map_err(in_time("listener"))?;
    let (kind, identity) = match port {
        Port::Iopub => (SocketType::Sub, [].as_slice()),
        Port::Heartbeat => (SocketType::Dealer, [].as_slice()),
        _ => (SocketType::Dealer, identity),
    };
    let handshake = shake_hands(&mut stream, kind, identity);
    let early = tokio::time::timeout_at(deadline, handshake).await.map_err(in_time("handshake"))??;
    let (reader, writer) = tokio::io::split(stream);
    let mut connection = Connection { port, reader, writer, early };
    match port {
        Port::Heartbeat => {
            tokio::time::timeout_at(deadline, connection.first_echo()).await.map_err(in_time("echo"))??
        }
        Port::Iopub => connection.await_welcome().await?,
        _ => {}
    }
    Ok(connection)
}

/// Dials until somebody listens. The kernel makes its sockets while it boots, so the first attempts fail.
async fn dial(endpoint: &Endpoint) -> Box<dyn Duplex> {
    loop {
        if let Ok(stream) = try_dial(endpoint).await {
            return stream;
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn try_dial(endpoint: &Endpoint) -> std::io::Result<Box<dyn Duplex>> {
    match endpoint {
        Endpoint::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        Endpoint::Tcp(port) => {
            let socket = TcpSocket::new_v4()?;
            // From another loopback address: a socket that dials a free port of its own address may meet itself, and would then
            // hold the port that the kernel wants.
            socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into())?;
            let stream = socket.connect((Ipv4Addr::LOCALHOST, *port).into()).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
    }
}

/// A heartbeat: an empty delimiter, as a REQ socket would send it, and a body.
fn beat() -> Bytes {
    message_chunks(&[Bytes::new(), Bytes::from_static(b"cellblock")]).concat().into()
}

impl Connection {
    async fn first_echo(&mut self) -> Result<(), ZmtpError> {
        self.writer.write_all(&beat()).await?;
        let mut echoes = Echoes::default();
        let mut buffer = std::mem::take(&mut self.early);
        while !echoes.push(&buffer)? {
            buffer.clear();
            if self.reader.read_buf(&mut buffer).await? == 0 {
                return Err(end_of_file());
            }
        }
        Ok(())
    }

    async fn await_welcome(&mut self) -> Result<(), ZmtpError> {
        if !self.early.is_empty() {
            return Ok(());
        }
        match tokio::time::timeout(WELCOME, self.reader.read_buf(&mut self.early)).await {
            Ok(Ok(0)) => Err(end_of_file()),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }
}

/// Recognises the end of echoed messages.
#[derive(Default)]
struct Echoes {
    decoder: FrameDecoder,
    is_last: bool,
}

impl Echoes {
    fn push(&mut self, mut bytes: &[u8]) -> Result<bool, ZmtpError> {
        let mut echoed = false;
        while let Some(item) = self.decoder.next(&mut bytes)? {
            match item {
                Item::Start(head) if head.length > MAX_ECHO => return Err(ZmtpError::Garbage("a long echo")),
                Item::Start(head) => self.is_last = !head.more && !head.command,
                Item::Data(_) => {}
                Item::End => echoed |= self.is_last,
            }
        }
        Ok(echoed)
    }
}

/// What a channel's items become.
pub trait Consumer {
    /// Takes an item; a returned command is to be answered.
    ///
    /// # Errors
    /// When the channel is of no further use.
    fn take(&mut self, port: Port, item: Item<'_>) -> Result<Option<Vec<u8>>, ZmtpError>;
    /// Passes on what is complete, and waits for room if there is none.
    fn settle(&mut self, port: Port) -> impl Future<Output = ()> + Send;
}

/// Reads and writes until the connection is of no further use, and says why.
pub async fn run(connection: Connection, outbox: &Outbox, consumer: impl Consumer) -> Broken {
    let port = connection.port;
    let result = if port == Port::Heartbeat {
        keep_beating(connection).await
    } else {
        relay(connection, outbox, consumer).await
    };
    match result {
        Err(error) => (port, error),
        Ok(never) => match never {},
    }
}

async fn relay(connection: Connection, outbox: &Outbox, consumer: impl Consumer) -> Result<Infallible, ZmtpError> {
    let Connection { port, reader, writer, early } = connection;
    let (answers, to_answer) = mpsc::channel(4);
    tokio::select! {
        ended = read_items(port, reader, early, consumer, answers) => ended,
        never = write_messages(port, writer, outbox, to_answer) => match never {},
    }
}

async fn read_items(
    port: Port,
    mut reader: Reader,
    mut buffer: BytesMut,
    mut consumer: impl Consumer,
    answers: mpsc::Sender<Bytes>,
) -> Result<Infallible, ZmtpError> {
    let mut decoder = FrameDecoder::default();
    loop {
        let mut input = &buffer[..];
        while let Some(item) = decoder.next(&mut input)? {
            let is_end = item == Item::End;
            if let Some(answer) = consumer.take(port, item)?.as_deref().and_then(answer_command) {
                // Who asks faster than he reads goes without an answer.
                let _ = answers.try_send(answer);
            }
            if is_end {
                consumer.settle(port).await;
            }
        }
        buffer.clear();
        buffer.reserve(READ);
        if reader.read_buf(&mut buffer).await? == 0 {
            return Err(end_of_file());
        }
    }
}

async fn write_messages(
    port: Port,
    mut writer: Writer,
    outbox: &Outbox,
    mut answers: mpsc::Receiver<Bytes>,
) -> Infallible {
    loop {
        let chunks = tokio::select! {
            frames = outbox.next(port) => message_chunks(&frames),
            Some(answer) = answers.recv() => vec![answer],
        };
        for chunk in chunks {
            if writer.write_all(&chunk).await.is_err() {
                // The reader learns of it too, after what is still to be read.
                return std::future::pending().await;
            }
        }
    }
}

async fn keep_beating(connection: Connection) -> Result<Infallible, ZmtpError> {
    let Connection { mut reader, mut writer, .. } = connection;
    let mut echoes = Echoes::default();
    let mut buffer = BytesMut::with_capacity(256);
    let mut next = Instant::now() + BEAT;
    loop {
        match tokio::time::timeout_at(next, reader.read_buf(&mut buffer)).await {
            Ok(Ok(0)) => return Err(end_of_file()),
            Ok(Ok(_)) => {
                echoes.push(&buffer)?;
                buffer.clear();
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                next = Instant::now() + BEAT;
                // A kernel that does not read may fill the socket; a beat that finds no room is left out.
                let _ = tokio::time::timeout(Duration::from_millis(1), writer.write(&beat())).await;
            }
        }
    }
}
