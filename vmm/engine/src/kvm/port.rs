//! Ports: how a guest talks to the VMM.

/// Gets what the guest writes to its ports.
pub trait PortHandler: Send + Sync {
    /// vCPU `vcpu` wrote `value` to `port`, on this vCPU's thread. A 1- or 2-byte `out` is zero-extended.
    ///
    /// The vCPU cannot be paused while this runs. It must not pause the machine: it would wait for itself.
    fn out(&self, vcpu: usize, port: u16, value: u32) -> PortAction;
}

/// What becomes of a vCPU after a port was written.
#[derive(Debug)]
pub enum PortAction {
    /// The guest runs on behind the `out`.
    Continue,
    /// The vCPU stops for good.
    Stop(StopReason),
    /// Nothing listens on the port: the guest has crashed.
    Unknown,
}

/// Why a port handler stopped a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum StopReason {
    /// The guest is done.
    #[error("guest exited with status {status}")]
    Exit {
        /// What the guest gave as its exit status.
        status: u32,
    },
    /// The guest says that it cannot go on.
    #[error("guest panicked: {message}")]
    Panic {
        /// Where and why, in the guest's words.
        message: String,
    },
    /// The handler itself cannot go on.
    #[error("port handler failed")]
    Failed {
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
