//! What a chain asks for, and the pins it needs.
//!
//! ```text
//!   to guest, from guest    header (R) ; data (W, or R) ... ; status (W)
//!   all others              header (R) ; status (W)
//! ```
//! Everything in a chain is the guest's word and believed only as far as it was checked. A chain with a
//! usable status is answered with [`STATUS_BAD_REQUEST`] if anything else is wrong with it; one without
//! is completed with no byte written.

use std::mem::{offset_of, size_of};
use std::sync::Arc;

use guest::abi::{
    QUEUE_SIZE, RequestHeader, RequestKind, STATUS_BAD_REQUEST, STATUS_MISMATCH, STATUS_OK, Status,
};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;

use super::registered;
use super::transfer::{Buffer, MAX_DATA, Words, WrongWord};
use palimpsest::host::{PinnedBuffer, Ram, RamError};
use palimpsest::mm::{Access, PinError};

/// The most descriptors in a chain; an indirect table could have more.
const MAX_DESCRIPTORS: usize = QUEUE_SIZE as usize;

/// A request that was taken from the ring. All it needs is pinned for as long as this lives.
pub(super) struct Request {
    /// First descriptor of its chain.
    pub(super) head: u16,
    /// Its number; 0 if it has no readable header.
    pub(super) seq: u64,
    /// Where the guest waits for the answer, if it said so.
    pub(super) status: Option<PinnedBuffer>,
    pub(super) action: RequestAction,
}

/// What there is to do.
pub(super) enum RequestAction {
    Transfer {
        direction: TransferDirection,
        data: Data,
    },
    /// Keep the buffer under this index.
    Register { index: u32, buffer: Arc<Buffer> },
    /// Release the buffer under this index.
    Unregister { index: u32 },
    /// Nothing: it made no sense.
    Bad,
    /// Nothing: there was no memory for its pins. It keeps its place, and is never answered.
    Unanswerable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TransferDirection {
    ToGuest,
    FromGuest,
}

pub(super) enum Data {
    Streamed(Vec<Buffer>),
    /// Looked up when the request's turn comes: the one before it may be the registration.
    Registered(u32),
}

/// How a request ended.
#[derive(Clone, Copy)]
pub(super) enum RequestOutcome {
    Done { bytes: u64 },
    Mismatch(WrongWord),
    BadRequest,
}

impl TransferDirection {
    /// What the data must be pinned for.
    fn access(self) -> Access {
        match self {
            Self::ToGuest => Access::Write,
            Self::FromGuest => Access::Read,
        }
    }

    /// Whether `buffer` may be the data.
    pub(super) fn may_use(self, buffer: &Buffer) -> bool {
        buffer.access == Access::Write || self.access() == Access::Read
    }

    /// Moves the data of a request, all of it or up to the first wrong word.
    pub(super) fn transfer(self, words: Words, buffers: &[Buffer]) -> RequestOutcome {
        let bytes = buffers.iter().map(Buffer::len).sum();
        match self {
            Self::ToGuest => {
                words.write(buffers);
                RequestOutcome::Done { bytes }
            }
            Self::FromGuest => words
                .compare(buffers)
                .map_or(RequestOutcome::Done { bytes }, RequestOutcome::Mismatch),
        }
    }
}

/// Why a chain did not become a request as it stands.
enum Refused {
    /// It is the guest's fault.
    BadRequest,
    /// It is not.
    Pin(PinError),
}

impl From<RamError> for Refused {
    fn from(error: RamError) -> Self {
        match error {
            RamError::OutOfRange { .. } => Self::BadRequest,
            RamError::Pin(error) => Self::Pin(error),
            RamError::Hold(error) => Self::Pin(error.into()),
        }
    }
}

impl Request {
    /// Reads a chain and pins what it names. If there was no memory for that, says why, with the request that
    /// can't be answered.
    pub(super) fn parse(ram: &Ram, mut chain: DescriptorChain<&Ram>) -> (Self, Option<PinError>) {
        let mut request = Self {
            head: chain.head_index(),
            seq: 0,
            status: None,
            action: RequestAction::Bad,
        };
        match request.fill(ram, &mut chain) {
            Ok(()) | Err(Refused::BadRequest) => (request, None),
            Err(Refused::Pin(error)) => {
                request.action = RequestAction::Unanswerable;
                (request, Some(error))
            }
        }
    }

    fn fill(&mut self, ram: &Ram, chain: &mut DescriptorChain<&Ram>) -> Result<(), Refused> {
        let descriptors: Vec<_> = chain.take(MAX_DESCRIPTORS).collect();
        let Some((last, rest)) = descriptors.split_last() else {
            return Err(Refused::BadRequest);
        };
        self.status = Some(pin_status(ram, last)?);
        let Some((first, data)) = rest.split_first() else {
            return Err(Refused::BadRequest);
        };
        let header = read_header(ram, first)?;
        self.seq = header.seq;
        let kind = RequestKind::from_raw(header.kind).ok_or(Refused::BadRequest)?;
        if data.is_empty() == is_streaming(kind) {
            return Err(Refused::BadRequest);
        }
        let direction = match kind {
            RequestKind::ToGuest | RequestKind::RegisteredToGuest => TransferDirection::ToGuest,
            _ => TransferDirection::FromGuest,
        };
        self.action = match kind {
            RequestKind::ToGuest | RequestKind::FromGuest => RequestAction::Transfer {
                direction,
                data: Data::Streamed(pin_data(ram, data, direction)?),
            },
            RequestKind::RegisteredToGuest | RequestKind::RegisteredFromGuest => {
                RequestAction::Transfer {
                    direction,
                    data: Data::Registered(header.buffer),
                }
            }
            // For reading and for writing.
            RequestKind::Register => RequestAction::Register {
                index: header.buffer,
                buffer: Arc::new(pin_registration(ram, &header, Access::Write)?),
            },
            RequestKind::RegisterForReading => RequestAction::Register {
                index: header.buffer,
                buffer: Arc::new(pin_registration(ram, &header, Access::Read)?),
            },
            RequestKind::Unregister => RequestAction::Unregister {
                index: header.buffer,
            },
        };
        Ok(())
    }

    /// Writes the status, if there is a place for it. Returns how many bytes of the chain were written.
    pub(super) fn answer(&self, outcome: RequestOutcome) -> u32 {
        let Some(status) = &self.status else {
            return 0;
        };
        let (code, offset) = match outcome {
            RequestOutcome::Done { .. } => (STATUS_OK, 0),
            RequestOutcome::Mismatch(wrong) => (STATUS_MISMATCH, wrong.offset),
            RequestOutcome::BadRequest => (STATUS_BAD_REQUEST, 0),
        };
        // `Status` as two words: `seq`, then `code` and `offset`.
        let words = [self.seq, u64::from(code) | offset << 32];
        for slice in status.slices() {
            slice.copy_from(&words);
        }
        let data = match (&self.action, outcome) {
            (
                RequestAction::Transfer {
                    direction: TransferDirection::ToGuest,
                    data: Data::Streamed(_),
                },
                RequestOutcome::Done { bytes },
            ) => bytes,
            _ => 0,
        };
        data as u32 + size_of::<Status>() as u32
    }
}

fn is_streaming(kind: RequestKind) -> bool {
    matches!(kind, RequestKind::ToGuest | RequestKind::FromGuest)
}

fn pin_status(ram: &Ram, last: &Descriptor) -> Result<PinnedBuffer, Refused> {
    const LEN: u64 = size_of::<Status>() as u64;
    let gpa = last.addr().0;
    // The last descriptor that was read need not be the last of the chain: it may go in circles, or nowhere.
    let usable = !last.has_next()
        && last.is_write_only()
        && u64::from(last.len()) == LEN
        && gpa.is_multiple_of(LEN);
    if !usable {
        return Err(Refused::BadRequest);
    }
    Ok(ram.pin(gpa, LEN, Access::Write)?)
}

fn read_header(ram: &Ram, first: &Descriptor) -> Result<RequestHeader, Refused> {
    const LEN: usize = size_of::<RequestHeader>();
    if first.is_write_only() || first.len() as usize != LEN {
        return Err(Refused::BadRequest);
    }
    let mut bytes = [0; LEN];
    ram.read(first.addr().0, &mut bytes)?;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    Ok(RequestHeader {
        kind: half(offset_of!(RequestHeader, kind)),
        buffer: half(offset_of!(RequestHeader, buffer)),
        seq: word(offset_of!(RequestHeader, seq)),
        gpa: word(offset_of!(RequestHeader, gpa)),
        len: word(offset_of!(RequestHeader, len)),
    })
}

fn pin_data(
    ram: &Ram,
    data: &[Descriptor],
    direction: TransferDirection,
) -> Result<Vec<Buffer>, Refused> {
    let is_sound = |d: &Descriptor| {
        d.len() > 0 && d.is_write_only() == (direction == TransferDirection::ToGuest)
    };
    let total: u64 = data.iter().map(|d| u64::from(d.len())).sum();
    if total > MAX_DATA || !data.iter().all(is_sound) {
        return Err(Refused::BadRequest);
    }
    data.iter()
        .map(|d| {
            Ok(Buffer::pin(
                ram,
                d.addr().0,
                d.len().into(),
                direction.access(),
            )?)
        })
        .collect()
}

fn pin_registration(ram: &Ram, header: &RequestHeader, access: Access) -> Result<Buffer, Refused> {
    if !registered::is_sound(header.buffer, header.len) {
        return Err(Refused::BadRequest);
    }
    Ok(Buffer::pin(ram, header.gpa, header.len, access)?)
}
