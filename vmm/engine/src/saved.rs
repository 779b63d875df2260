//! What a snapshot keeps of a part of a VM: opaque to all but that part, and bytes with a version to whoever
//! stores it.

use std::any::Any;
use std::fmt::{self, Debug};
use std::sync::Arc;

/// The state of a part of a VM, as only that part understands it.
pub trait State: Any + Debug + Send + Sync {
    /// Which form [`State::to_bytes`] has. A part reads the forms of its earlier versions too, and refuses
    /// others.
    fn version(&self) -> u32;

    /// The state as bytes, from which the part can make it again. What comes back is not trusted.
    fn to_bytes(&self) -> Vec<u8>;
}

/// A state that was captured, or read from where it was stored. Copies share it.
#[derive(Clone)]
pub struct Saved(Arc<dyn State>);

impl Saved {
    /// What a part has captured.
    pub fn new(state: impl State) -> Self {
        Self(Arc::new(state))
    }

    /// What was stored: bytes, and the version they came with.
    pub fn stored(version: u32, bytes: Vec<u8>) -> Self {
        Self::new(Stored { version, bytes })
    }

    /// The state itself, if it was captured by a part whose states are of type `S`. It is not if it was
    /// stored since.
    pub fn get<S: State>(&self) -> Option<&S> {
        let state: &dyn Any = &*self.0;
        state.downcast_ref()
    }

    /// Which form the bytes have.
    pub fn version(&self) -> u32 {
        self.0.version()
    }

    /// The bytes to store.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes()
    }
}

impl Debug for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes that nobody has looked at.
#[derive(Debug)]
struct Stored {
    version: u32,
    bytes: Vec<u8>,
}

impl State for Stored {
    fn version(&self) -> u32 {
        self.version
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Number(u8);

    impl State for Number {
        fn version(&self) -> u32 {
            3
        }
        fn to_bytes(&self) -> Vec<u8> {
            vec![self.0]
        }
    }

    #[test]
    fn who_has_captured_it_finds_it_and_others_find_bytes() {
        let saved = Saved::new(Number(7));
        assert_eq!(saved.get::<Number>(), Some(&Number(7)));
        let stored = Saved::stored(saved.version(), saved.to_bytes());
        assert_eq!(stored.get::<Number>(), None);
        assert_eq!((stored.version(), stored.to_bytes()), (3, vec![7]));
    }
}
