//! Answers names on the container's loopback: `localhost` is this machine, and nothing else exists. No query leaves the container.
//!
//! A container without a network has an empty `/etc/hosts` and no resolver, so in most images not even `localhost` would resolve: their C
//! libraries then ask 127.0.0.1 (resolver(5)). Names of the world fail at once instead of after a timeout. Message format: RFC 1035,
//! section 4; `localhost`: RFC 6761, section 6.3.

use std::net::{Ipv4Addr, Ipv6Addr};

use tokio::net::UdpSocket;

/// Longest query that is read, in bytes; also the longest one that the protocol allows without extensions.
const MAX_QUERY: usize = 512;
/// Length of a message's header.
const HEADER: usize = 12;
/// Seconds that an answer may be kept.
const TTL: u32 = 60;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
const NO_ERROR: u8 = 0;
const NO_SUCH_NAME: u8 = 3;

/// Answers until the process ends. Where the port can't be had (a host that protects low ports in containers too), names resolve as
/// the image has it.
pub async fn serve() {
    let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).await else { return };
    let mut buffer = [0; MAX_QUERY];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        if let Some(answer) = answer(&buffer[..length]) {
            // Whoever asked may be gone.
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

/// The answer to a query; nothing for what is no query.
#[must_use]
pub fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let header = query.get(..HEADER)?;
    let is_plain_query = header[2] & 0xf8 == 0 && header[4..6] == [0, 1];
    if !is_plain_query {
        return None;
    }
    let (name, end) = read_name(query)?;
    let number = |at: usize| query.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let (kind, class) = (number(end)?, number(end + 2)?);
    let is_local = class == CLASS_IN && (name == "localhost" || name.ends_with(".localhost"));
    let address = match kind {
        TYPE_A if is_local => Ipv4Addr::LOCALHOST.octets().to_vec(),
        TYPE_AAAA if is_local => Ipv6Addr::LOCALHOST.octets().to_vec(),
        _ => Vec::new(),
    };
    let mut message = header[..2].to_vec();
    // An answer with authority; recursion was asked for or not, and is available.
    message.push(0x84 | (header[2] & 1));
    message.push(0x80 | if is_local { NO_ERROR } else { NO_SUCH_NAME });
    message.extend([0, 1, 0, u8::from(!address.is_empty()), 0, 0, 0, 0]);
    message.extend(&query[HEADER..end + 4]);
    if !address.is_empty() {
        // The name is the question's.
        message.extend([0xc0, HEADER as u8]);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message.extend(TTL.to_be_bytes());
        message.extend((address.len() as u16).to_be_bytes());
        message.extend(address);
    }
    Some(message)
}

/// The question's name in lower case, and where it ends. Compression makes no sense in a question.
fn read_name(query: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        match length {
            0 => return Some((labels.join("."), at)),
            1..=63 => {
                let label = query.get(at..at + length)?;
                labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
                at += length;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.extend([0, (kind >> 8) as u8, kind as u8, 0, 1]);
        message
    }

    fn code_and_address(answer: &[u8], question: &[u8]) -> (u8, Vec<u8>) {
        let rest = &answer[question.len()..];
        (answer[3] & 15, rest.get(12..).unwrap_or_default().to_vec())
    }

    #[test]
    fn localhost_is_this_machine_and_nothing_else_exists() {
        for (name, kind, expected) in [
            ("localhost", TYPE_A, (NO_ERROR, vec![127, 0, 0, 1])),
            ("LocalHost", TYPE_AAAA, (NO_ERROR, Ipv6Addr::LOCALHOST.octets().to_vec())),
            ("app.localhost", TYPE_A, (NO_ERROR, vec![127, 0, 0, 1])),
            ("localhost", 15, (NO_ERROR, vec![])),
            ("example.org", TYPE_A, (NO_SUCH_NAME, vec![])),
            ("localhost.example.org", TYPE_A, (NO_SUCH_NAME, vec![])),
        ] {
            let question = query(name, kind);
            let answer = answer(&question).unwrap();
            assert_eq!(answer[..2], [0xab, 0xcd]);
            assert_eq!(code_and_address(&answer, &question), expected, "{name} {kind}");
        }
    }

    proptest! {
        #[test]
        fn no_datagram_panics_and_no_answer_is_much_longer(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(answer) = answer(&bytes) {
                prop_assert!(answer.len() <= bytes.len() + 28);
            }
        }
    }
}
