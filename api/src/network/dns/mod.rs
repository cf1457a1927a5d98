//! Answers guests' DNS queries: names of their own network's guests from the directory, and everything else by
//! asking the host's name servers, if the network leads outside at all.
//!
//! Each network has its own sockets, on its gateway's address: a guest that is let speak to one of them is in
//! that network, and is told of no other. A query is answered at once or passed on unchanged, and its answer
//! passed back; there is no cache, the host's name servers have theirs.
//!
//! What a guest can take is bounded: queries under way and connections are, for each guest and for all.

mod message;
mod resolvers;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::message::{Code, MAX_UDP, Question, Unfit, Wanted};
pub use self::resolvers::Resolvers;
use super::directory::{Directory, Names};

pub const PORT: u16 = 53;
/// How long one name server may take; then the next is asked. Guests ask again after 5 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a connection of a guest's may be silent.
const IDLE: Duration = Duration::from_secs(10);
/// Queries passed on and connections that wait for something: of one guest, and of one network.
const PER_GUEST: usize = 64;
const PER_NETWORK: usize = 1024;
/// Longest query, and longest answer by UDP that is passed back; a longer one has to be asked for by TCP.
const MAX_MESSAGE: usize = 4096;

/// The sockets of one network.
#[derive(Debug)]
pub struct Sockets {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

impl Sockets {
    /// Opens them at `gateway`, which must be an address of the host's.
    ///
    /// # Errors
    ///
    /// Those of bind(2).
    pub fn bind(gateway: Ipv4Addr) -> io::Result<Self> {
        let udp = std::net::UdpSocket::bind((gateway, PORT))?;
        let tcp = std::net::TcpListener::bind((gateway, PORT))?;
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { udp, tcp })
    }
}

/// One network's server.
#[derive(Clone)]
struct Server {
    network: String,
    directory: Directory,
    resolvers: Resolvers,
    load: Load,
}

/// Answers for as long as it is run.
pub async fn serve(
    sockets: Sockets,
    network: String,
    directory: Directory,
    resolvers: Resolvers,
) -> io::Result<()> {
    let udp = Arc::new(UdpSocket::from_std(sockets.udp)?);
    let tcp = TcpListener::from_std(sockets.tcp)?;
    let server = Server { network, directory, resolvers, load: Load::default() };
    // They end with this future, not with the runtime.
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut buffer) => {
                // An error is about an answer sent before.
                let Ok((length, from)) = received else { continue };
                let query = buffer.get(..length).unwrap_or_default();
                match server.local(query, MAX_UDP) {
                    Outcome::Silent => {}
                    Outcome::Answer(answer) => _ = udp.try_send_to(&answer, from),
                    Outcome::Forward(question) => {
                        let Some(slot) = server.load.take(from.ip()) else { continue };
                        let (server, udp, query) = (server.clone(), udp.clone(), query.to_vec());
                        tasks.spawn(async move {
                            let answer = server.forward_udp(&question, &query).await;
                            let answer = answer.unwrap_or_else(|| question.refuse(Code::ServerFailure));
                            let _ = udp.send_to(&answer, from).await;
                            drop(slot);
                        });
                    }
                }
            }
            accepted = tcp.accept() => {
                let Ok((stream, from)) = accepted else {
                    // No descriptors are left; whoever waits goes on waiting.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let Some(slot) = server.load.take(from.ip()) else { continue };
                let server = server.clone();
                tasks.spawn(async move {
                    let _ = server.connection(stream).await;
                    drop(slot);
                });
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// What becomes of a query.
enum Outcome {
    Silent,
    Answer(Vec<u8>),
    /// Others have to be asked.
    Forward(Question),
}

impl Server {
    fn local(&self, query: &[u8], limit: usize) -> Outcome {
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(Unfit::Silent) => return Outcome::Silent,
            Err(Unfit::Answer(answer)) => return Outcome::Answer(answer),
        };
        match self.directory.names(&self.network, |names| answer(&question, names, limit)) {
            // The network is being removed.
            None => Outcome::Answer(question.refuse(Code::Refused)),
            Some(Some(answer)) => Outcome::Answer(answer),
            Some(None) => Outcome::Forward(question),
        }
    }

    async fn forward_udp(&self, question: &Question, query: &[u8]) -> Option<Vec<u8>> {
        for server in self.resolvers.servers().iter() {
            if let Ok(Ok(answer)) = timeout(PATIENCE, ask_udp(*server, question, query)).await {
                return Some(answer);
            }
        }
        None
    }

    async fn forward_tcp(&self, question: &Question, query: &[u8]) -> Option<Vec<u8>> {
        for server in self.resolvers.servers().iter() {
            let ask = async {
                let mut stream = TcpStream::connect(server).await?;
                write_framed(&mut stream, query).await?;
                read_framed(&mut stream, usize::from(u16::MAX)).await
            };
            if let Ok(Ok(Some(answer))) = timeout(PATIENCE, ask).await
                && question.is_answered_by(&answer)
            {
                return Some(answer);
            }
        }
        None
    }

    /// Answers one query after the other until the guest is done.
    async fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let Ok(query) = timeout(IDLE, read_framed(&mut stream, MAX_MESSAGE)).await else { return Ok(()) };
            let Some(query) = query? else { return Ok(()) };
            let answer = match self.local(&query, usize::from(u16::MAX)) {
                Outcome::Silent => return Ok(()),
                Outcome::Answer(answer) => answer,
                Outcome::Forward(question) => {
                    let answer = self.forward_tcp(&question, &query).await;
                    answer.unwrap_or_else(|| question.refuse(Code::ServerFailure))
                }
            };
            let Ok(written) = timeout(IDLE, write_framed(&mut stream, &answer)).await else {
                return Ok(());
            };
            written?;
        }
    }
}

/// The answer if the question is about the network, or may not be asked elsewhere.
fn answer(question: &Question, names: &Names, limit: usize) -> Option<Vec<u8>> {
    let network = &names.network;
    let domain = &network.domain;
    let Some(name) = &question.name else { return elsewhere(question, network.nat) };
    let label = match name.strip_suffix(domain.as_str()) {
        Some("") => return Some(question.nothing(Code::NoError, domain)),
        Some(label) if label.ends_with('.') => label.strip_suffix('.'),
        // A bare name, as without a search list.
        _ if !name.contains('.') && !name.is_empty() => Some(name.as_str()),
        _ => None,
    };
    if let Some(label) = label {
        return Some(match (names.addresses(label), question.wanted()) {
            (Some(addresses), Wanted::Address) => question.addresses(addresses, limit),
            (Some(_), _) => question.nothing(Code::NoError, domain),
            (None, _) => question.nothing(Code::NoSuchName, domain),
        });
    }
    if let Some(address) = reverse(name)
        && network.subnet.contains(&address)
    {
        return Some(match (names.name(address), question.wanted()) {
            (Some(name), Wanted::Name) => question.name(&format!("{name}.{domain}")),
            (Some(_), _) => question.nothing(Code::NoError, domain),
            (None, _) => question.nothing(Code::NoSuchName, domain),
        });
    }
    elsewhere(question, network.nat)
}

/// A network that does not lead outside does not by way of name servers either.
fn elsewhere(question: &Question, nat: bool) -> Option<Vec<u8>> {
    (!nat).then(|| question.refuse(Code::Refused))
}

/// The address in a name such as `4.0.0.10.in-addr.arpa` (RFC 1035, section 3.5).
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut labels = name.strip_suffix(".in-addr.arpa")?.split('.');
    for octet in octets.iter_mut().rev() {
        *octet = labels.next()?.parse().ok()?;
    }
    labels.next().is_none().then(|| octets.into())
}

/// Asks from a port of its own, so that an answer can hardly be forged.
async fn ask_udp(server: SocketAddr, question: &Question, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; MAX_MESSAGE + 1];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let message = buffer.get(..length).unwrap_or_default();
        if question.is_answered_by(message) {
            let whole = length <= MAX_MESSAGE;
            return Ok(if whole { message.to_vec() } else { question.truncated() });
        }
    }
}

/// A message with its length before it (RFC 1035, section 4.2.2), of at most `limit` bytes. None at the end.
async fn read_framed(stream: &mut TcpStream, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match stream.read_exact(&mut length).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => _ = other?,
    }
    let length = usize::from(u16::from_be_bytes(length));
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// What guests have under way.
#[derive(Clone, Debug, Default)]
struct Load(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One thing of a guest's under way, until dropped.
struct Slot {
    load: Load,
    guest: IpAddr,
}

impl Load {
    /// A place for one more, if the guest and the network have one left.
    fn take(&self, guest: IpAddr) -> Option<Slot> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        if counts.get(&guest).is_some_and(|own| *own >= PER_GUEST) || all >= PER_NETWORK {
            return None;
        }
        *counts.entry(guest).or_default() += 1;
        Some(Slot { load: self.clone(), guest })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.load.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = counts.get_mut(&self.guest) {
            *own -= 1;
            if *own == 0 {
                counts.remove(&self.guest);
            }
        }
    }
}

#[cfg(test)]
#[path = "dns_tests.rs"]
mod tests;
