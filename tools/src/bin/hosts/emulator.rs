//! How an emulator is told to boot a host.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::host::Processor;
use super::packages::{self, PackageError, Store, Unpacked};

/// What a host boots from, and where its serial ports go.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) processor: Processor,
    /// A folder of its own.
    pub(crate) folder: PathBuf,
    pub(crate) kernel: PathBuf,
}

/// Why there is no emulator to start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EmulatorError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error("{}: cannot write", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot run {program}")]
    Start {
        program: &'static str,
        source: io::Error,
    },
    #[error("cannot make a disc that boots:\n{said}")]
    Disc { said: String },
}

impl Processor {
    /// Whether results are to be padded: Bochs keeps the last block of a port's output to itself.
    pub(crate) const fn is_padded(self) -> bool {
        matches!(self, Self::Intel)
    }

    /// Nothing that is right takes longer to boot, on a machine that is busy with other things.
    pub(crate) const fn boot_limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Amd => 180,
            Self::Intel => 1800,
        })
    }

    /// How many seconds one second of its clock may last.
    pub(crate) const fn slowness(self) -> u32 {
        match self {
            Self::Amd => 1,
            Self::Intel => 10,
        }
    }
}

impl Machine {
    /// The file system that it begins with, which must be there before it is started.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs")
    }

    /// What the first serial port has said: kernel and init.
    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join("console.txt")
    }

    /// What the second one has said: results.
    pub(crate) fn results(&self) -> PathBuf {
        self.folder.join("results.txt")
    }

    /// What the emulator itself has said.
    pub(crate) fn complaints(&self) -> PathBuf {
        self.folder.join("emulator.txt")
    }

    /// The emulator, ready to be started.
    pub(crate) fn command(&self, store: &Store) -> Result<Command, EmulatorError> {
        match self.processor {
            Processor::Amd => self.qemu(&store.get(&packages::QEMU)?),
            Processor::Intel => {
                self.bochs(&store.get(&packages::BOCHS)?, &store.get(&packages::GRUB)?)
            }
        }
    }

    fn qemu(&self, qemu: &Unpacked) -> Result<Command, EmulatorError> {
        let mut command = child("KILL");
        command.arg(qemu.path("/usr/bin/qemu-system-x86_64")?);
        qemu.with_libraries(&mut command);
        for folder in ["/usr/share/qemu", "/usr/share/seabios"] {
            command.arg("-L").arg(qemu.path(folder)?);
        }
        // With thread=multi the emulated kernel locks up while it patches its code, or loses its stacks.
        command.args(["-machine", "q35", "-accel", "tcg,thread=single"]);
        command.args(["-cpu", "EPYC,+svm,+npt", "-smp", "2", "-m", "4G"]);
        command.arg("-kernel").arg(&self.kernel);
        command.arg("-initrd").arg(self.initramfs());
        command.args([
            "-append",
            // On a machine that is busy a tick may not come before the kernel has stopped
            // waiting for it, and panics.
            "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable",
        ]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        for port in [self.console(), self.results()] {
            command
                .arg("-serial")
                .arg(format!("file:{}", port.display()));
        }
        Ok(command)
    }

    fn bochs(&self, bochs: &Unpacked, grub: &Unpacked) -> Result<Command, EmulatorError> {
        let disc = self.disc(grub)?;
        let write = |name: &str, content: &str| {
            let path = self.folder.join(name);
            match fs::write(&path, content) {
                Ok(()) => Ok(path),
                Err(source) => Err(EmulatorError::Write { path, source }),
            }
        };
        let settings = [
            "config_interface: textconfig".to_owned(),
            "display_library: term".to_owned(),
            "cpu: model=corei7_haswell_4770, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1, cpuid_limit_winnt=0".to_owned(),
            "memory: guest=1024, host=1024".to_owned(),
            format!("romimage: file={}, options=fastboot", bochs.path("/usr/share/bochs/BIOS-bochs-latest")?.display()),
            format!("vgaromimage: file={}", bochs.path("/usr/share/vgabios/vgabios.bin")?.display()),
            "pci: enabled=1, chipset=i440fx".to_owned(),
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14".to_owned(),
            format!("ata0-master: type=cdrom, path={}, status=inserted", disc.display()),
            "boot: cdrom".to_owned(),
            "floppy_bootsig_check: disabled=1".to_owned(),
            "speaker: enabled=0".to_owned(),
            "sound: driver=dummy".to_owned(),
            // Its clock goes by instructions.
            "clock: sync=none, time0=utc".to_owned(),
            format!("com1: enabled=1, mode=file, dev={}", self.console().display()),
            format!("com2: enabled=1, mode=file, dev={}", self.results().display()),
            format!("log: {}", self.folder.join("bochs.txt").display()),
            "panic: action=fatal".to_owned(),
            "error: action=ignore".to_owned(),
            "info: action=ignore".to_owned(),
            "debug: action=ignore".to_owned(),
        ];
        let settings = write("bochsrc", &(settings.join("\n") + "\n"))?;
        // This build of Bochs begins in its debugger, which is told to go on.
        let commands = write("commands", "c\n")?;
        let mut command = child("TERM");
        bochs.with_libraries(&mut command);
        // Nor does it find its own parts where it was not installed.
        let parts = bochs.path("/usr/lib/x86_64-linux-gnu/bochs/plugins")?;
        command.env("LTDL_LIBRARY_PATH", parts);
        // Its display is a terminal, which `script` makes.
        let line = format!(
            "stty rows 25 cols 80; exec {} -q -f {} -rc {}",
            bochs.path("/usr/bin/bochs-bin")?.display(),
            settings.display(),
            commands.display()
        );
        command.env("TERM", "vt100");
        command.args(["script", "-q", "-e", "-c", &line, "/dev/null"]);
        Ok(command)
    }

    /// A disc that boots the host, as Bochs can load no kernel itself.
    fn disc(&self, grub: &Unpacked) -> Result<PathBuf, EmulatorError> {
        let tree = self.folder.join("disc");
        let boot = tree.join("boot");
        let configuration = "set timeout=0\n\
            linux /boot/vmlinuz console=ttyS0,115200 quiet nokaslr panic=-1 mitigations=off no_timer_check idle=halt tsc=reliable\n\
            initrd /boot/initrd\n\
            boot\n";
        let folder = boot.join("grub");
        let written = fs::create_dir_all(&folder)
            .and_then(|()| fs::copy(&self.kernel, boot.join("vmlinuz")).map(drop))
            .and_then(|()| fs::rename(self.initramfs(), boot.join("initrd")))
            .and_then(|()| fs::write(folder.join("grub.cfg"), configuration));
        written.map_err(|source| EmulatorError::Write { path: boot, source })?;
        let disc = self.folder.join("disc.iso");
        let mut command = Command::new(grub.path("/usr/bin/grub-mkrescue")?);
        grub.with_libraries(&mut command);
        command
            .arg("--directory")
            .arg(grub.path("/usr/lib/grub/i386-pc")?)
            .arg("--xorriso")
            .arg(grub.path("/usr/bin/xorriso")?)
            .args([
                "--install-modules=linux normal iso9660 biosdisk",
                "--fonts=",
                "--themes=",
                "--locales=",
            ])
            .arg("--output")
            .args([&disc, &tree])
            .stdin(Stdio::null());
        let output = command.output().map_err(|source| EmulatorError::Start {
            program: "grub-mkrescue",
            source,
        })?;
        if output.status.success() {
            Ok(disc)
        } else {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(EmulatorError::Disc { said })
        }
    }
}

/// A command, to be completed, that takes what CPU time others leave and does not outlive this program:
/// it is sent `signal` then.
fn child(signal: &str) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "10", "setpriv", "--pdeathsig", signal]);
    command
}
