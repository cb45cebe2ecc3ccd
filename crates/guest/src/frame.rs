//! Frames: a byte for the kind, four for the length of the payload (little-endian), and the payload.
//!
//! Left out on purpose: numbers of requests or channels, since each request has a connection of its own.

use std::io::{self, ErrorKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest payload of a frame, in bytes.
pub const MOST_PAYLOAD: usize = 64 << 10;

const HEAD: usize = 5;

/// What a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JSON: one of the types in [`request`](crate::request).
    Message,
    /// Bytes for a command's standard input. A frame without any is its end.
    Stdin,
    /// Bytes of a command's standard output, or of its terminal.
    Stdout,
    /// Bytes of a command's standard error.
    Stderr,
    /// One file, folder or link of a copy: an [`Entry`](crate::copy::Entry).
    Entry,
    /// Bytes of the file whose entry came before. A frame without any is the file's end.
    Data,
    /// The end of a copy.
    End,
}

impl Kind {
    const ALL: [Self; 7] = [Self::Message, Self::Stdin, Self::Stdout, Self::Stderr, Self::Entry, Self::Data, Self::End];

    fn from_byte(byte: u8) -> io::Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u8 == byte);
        found.ok_or_else(|| invalid(format!("The peer sent a frame of the unknown kind {byte}")))
    }
}

/// A frame as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: Kind,
    /// At most [`MOST_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The message in a frame.
    ///
    /// # Errors
    ///
    /// The frame is no message, or none of this type: `InvalidData`.
    pub fn message<T: DeserializeOwned>(&self) -> io::Result<T> {
        if self.kind != Kind::Message {
            return Err(invalid(format!("The peer sent {:?} where a message was due", self.kind)));
        }
        serde_json::from_slice(&self.payload)
            .map_err(|error| invalid(format!("The peer's message is not understood: {error}")))
    }
}

/// Reads one frame; `None` where the stream has ended before one.
///
/// # Errors
///
/// The stream's own, its end within a frame (`UnexpectedEof`), or what is no frame (`InvalidData`): the connection is
/// of no use any more.
pub fn read_frame(input: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; HEAD];
    loop {
        match input.read(&mut head[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    input.read_exact(&mut head[1..])?;
    let (kind, length) = parse_head(head)?;
    let mut payload = vec![0; length];
    input.read_exact(&mut payload)?;
    Ok(Some(Frame { kind, payload }))
}

/// Reads one message, which must be there.
///
/// # Errors
///
/// Those of [`read_frame`] and [`Frame::message`], and `UnexpectedEof` where there is no frame.
pub fn read_message<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<T> {
    let frame = read_frame(input)?;
    frame.ok_or_else(|| io::Error::new(ErrorKind::UnexpectedEof, "The peer closed the connection"))?.message()
}

/// Writes one frame, in one call if the stream takes it.
///
/// # Errors
///
/// The stream's own, and `InvalidInput` for a payload that is too long.
pub fn write_frame(output: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(HEAD + payload.len());
    encode(kind, payload, &mut frame)?;
    output.write_all(&frame)
}

/// Writes one message.
///
/// # Errors
///
/// As for [`write_frame`].
pub fn write_message(output: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    write_frame(output, Kind::Message, &json(message)?)
}

/// Appends one frame to `output`.
///
/// # Errors
///
/// `InvalidInput` for a payload that is too long.
pub fn encode(kind: Kind, payload: &[u8], output: &mut Vec<u8>) -> io::Result<()> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MOST_PAYLOAD);
    let length = length.ok_or_else(|| {
        let message = format!("{} bytes are too many for one frame: say it in {MOST_PAYLOAD}", payload.len());
        io::Error::new(ErrorKind::InvalidInput, message)
    })?;
    output.push(kind as u8);
    output.extend_from_slice(&length.to_le_bytes());
    output.extend_from_slice(payload);
    Ok(())
}

/// Appends one message to `output`.
///
/// # Errors
///
/// As for [`encode`].
pub fn encode_message(message: &impl Serialize, output: &mut Vec<u8>) -> io::Result<()> {
    encode(Kind::Message, &json(message)?, output)
}

/// Makes frames of bytes as they come, for a side that must not wait for the rest of a frame.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes bytes of the stream. Ask [`next`](Self::next) until there is no more before the next ones, and what is
    /// kept stays as short as a frame.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame that has come in full.
    ///
    /// # Errors
    ///
    /// What came is no frame (`InvalidData`): the connection is of no use any more.
    #[allow(clippy::should_implement_trait, reason = "after an end there may be more, which no iterator allows")]
    pub fn next(&mut self) -> io::Result<Option<Frame>> {
        let Some(head) = self.buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let (kind, length) = parse_head(*head)?;
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        let payload = self.buffer[HEAD..HEAD + length].to_vec();
        self.buffer.drain(..HEAD + length);
        Ok(Some(Frame { kind, payload }))
    }
}

fn parse_head(head: [u8; HEAD]) -> io::Result<(Kind, usize)> {
    let [kind, length @ ..] = head;
    let kind = Kind::from_byte(kind)?;
    let length = u32::from_le_bytes(length);
    match usize::try_from(length) {
        Ok(length) if length <= MOST_PAYLOAD => Ok((kind, length)),
        _ => Err(invalid(format!("The peer announced a frame of {length} bytes; {MOST_PAYLOAD} are the most"))),
    }
}

fn json(message: &impl Serialize) -> io::Result<Vec<u8>> {
    serde_json::to_vec(message).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))
}

pub(crate) fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::{Answer, Request, Setup};

    #[test]
    fn a_frame_is_read_as_it_was_written() {
        for kind in Kind::ALL {
            for length in [0, 1, MOST_PAYLOAD] {
                let frame = Frame { kind, payload: vec![7; length] };
                let mut bytes = Vec::new();
                write_frame(&mut bytes, kind, &frame.payload).unwrap();
                assert_eq!(bytes.len(), HEAD + length);
                assert_eq!(read_frame(&mut bytes.as_slice()).unwrap(), Some(frame));
            }
        }
    }

    #[test]
    fn a_payload_that_is_too_long_is_neither_written_nor_read() {
        let mut out = Vec::new();
        let error = write_frame(&mut out, Kind::Data, &vec![0; MOST_PAYLOAD + 1]).unwrap_err();
        assert_eq!((error.kind(), out.len()), (ErrorKind::InvalidInput, 0));
        let length = u32::try_from(MOST_PAYLOAD + 1).unwrap().to_le_bytes();
        let head = [&[Kind::Data as u8][..], &length].concat();
        assert_eq!(read_frame(&mut head.as_slice()).unwrap_err().kind(), ErrorKind::InvalidData);
        let mut decoder = Decoder::default();
        decoder.feed(&head);
        assert_eq!(decoder.next().unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn an_end_between_frames_is_none_and_an_end_within_one_is_an_error() {
        assert_eq!(read_frame(&mut [].as_slice()).unwrap(), None);
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Stdin, b"abc").unwrap();
        for length in 1..bytes.len() {
            let error = read_frame(&mut &bytes[..length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_or_an_error(bytes: Vec<u8>) {
            let mut input = bytes.as_slice();
            while let Ok(Some(frame)) = read_frame(&mut input) {
                let _ = frame.message::<Request>();
                let _ = frame.message::<Answer>();
                let _ = frame.message::<Setup>();
            }
        }

        #[test]
        fn frames_come_out_the_same_however_the_stream_is_cut(
            payloads in prop::collection::vec((0u8..7, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
            cut in 1usize..30,
        ) {
            let frames: Vec<Frame> = payloads
                .into_iter()
                .map(|(kind, payload)| Frame { kind: Kind::from_byte(kind).unwrap(), payload })
                .collect();
            let mut bytes = Vec::new();
            for frame in &frames {
                encode(frame.kind, &frame.payload, &mut bytes).unwrap();
            }
            let (mut decoder, mut found) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(cut) {
                decoder.feed(piece);
                while let Some(frame) = decoder.next().unwrap() {
                    found.push(frame);
                }
            }
            prop_assert_eq!(found, frames);
        }
    }
}
