//! The line with which a program of the host says which port of the guest it wants.

use super::stream::Stream;

/// The longest line, with its end: `CONNECT ` and the ten digits of the highest port.
const LINE_MAX: usize = "CONNECT 4294967295\n".len();

/// Why there will be no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GreetingError {
    /// It is not `CONNECT` and a port.
    Line,
    /// The program has gone, or stopped sending.
    Gone,
}

/// What has been read of the line.
#[derive(Clone, Debug, Default)]
pub struct Greeting {
    line: Vec<u8>,
}

impl Greeting {
    /// Reads what there is of the line, and nothing of what may follow it. `None` when its end has not come yet.
    ///
    /// # Errors
    /// When there will be no such line.
    pub fn read(&mut self, stream: &Stream) -> Result<Option<u32>, GreetingError> {
        // One byte at a time, so that what follows stays in the socket.
        while self.line.len() < LINE_MAX {
            let Some(byte) = stream.receive_byte().map_err(|_| GreetingError::Gone)? else {
                return Ok(None);
            };
            self.line.push(byte);
            if byte == b'\n' {
                break;
            }
        }
        port(&self.line).map(Some).ok_or(GreetingError::Line)
    }
}

/// The port in a whole line. All ports but the highest, which stands for any (VMADDR_PORT_ANY), are ports.
fn port(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let port: u32 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (plain && port != u32::MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::children;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_line_is_connect_and_a_port_and_nothing_else() {
        for (line, expected) in [
            ("CONNECT 52\n", Some(52)),
            ("CONNECT 0\n", Some(0)),
            ("CONNECT 007\n", Some(7)),
            ("CONNECT 4294967294\n", Some(4_294_967_294)),
            ("CONNECT 4294967295\n", None),
            ("CONNECT 4294967296\n", None),
            ("CONNECT 99999999999999999999\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT +1\n", None),
            ("CONNECT 5 2\n", None),
            ("CONNECT  52\n", None),
            ("CONNECT 52\r\n", None),
            ("CONNECT \n", None),
            ("CONNECT\n", None),
            ("connect 52\n", None),
            ("CONNECT 52", None),
            ("GET / HTTP/1.1\n", None),
            ("CONNECT \u{665}\n", None),
            ("\n", None),
            ("", None),
        ] {
            assert_eq!(port(line.as_bytes()), expected, "{line:?}");
        }
    }

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Stream::new(ours.into()), theirs)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_what_follows_it_is_left_alone() {
        let (stream, mut theirs) = pair();
        let mut greeting = Greeting::default();
        for piece in ["CON", "NECT 1", "23"] {
            theirs.write_all(piece.as_bytes()).unwrap();
            assert_eq!(greeting.read(&stream), Ok(None));
        }
        theirs.write_all(b"4\nCONNECT 9\n").unwrap();
        assert_eq!(greeting.read(&stream), Ok(Some(1234)));
        assert_eq!(stream.receive_byte(), Ok(Some(b'C')));
    }

    #[test]
    fn a_line_without_end_is_given_up_and_so_is_one_that_breaks_off() {
        let _closing = children::none();
        let (stream, mut theirs) = pair();
        theirs.write_all(&[b'C'; 1000]).unwrap();
        let mut greeting = Greeting::default();
        assert_eq!(greeting.read(&stream), Err(GreetingError::Line));
        assert!(greeting.line.len() <= LINE_MAX);
        drop(stream);
        assert_eq!(theirs.read(&mut [0; 9]).ok().unwrap_or(0), 0);

        let (stream, mut theirs) = pair();
        theirs.write_all(b"CONNECT 5").unwrap();
        drop(theirs);
        assert_eq!(Greeting::default().read(&stream), Err(GreetingError::Gone));
    }
}
