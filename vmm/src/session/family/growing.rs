//! How clones come to be.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Family;
use super::member::Member;
use super::progress::Phase;
use super::report::Forking;
use crate::run_snapshot::RunSnapshot;
use crate::session::end::End;
use crate::session::occasion::PATIENCE;
use crate::session::ports::events;
use palimpsest::causes::chain;
use palimpsest::mm::{PAGE_SIZE, PromiseError};

/// Shells that are made before clones are.
const MOST_SHELLS: u64 = 256;
/// How often the root is looked at while it warms up.
const LOOK: Duration = Duration::from_millis(5);

impl Family<'_> {
    /// Lets the root warm up, and makes all clones.
    pub(super) fn grow(&mut self) -> Result<(), End> {
        let (generations, width) = self.config.shape.generations();
        let clones = self.config.machines() - 1;
        self.shells.want(clones.min(MOST_SHELLS) as usize);
        let before = self.warm_up()?;
        // A clone that finds none makes its own.
        self.shells.wait_until_ready();
        let began = (Instant::now(), self.ops_of_root());
        let mut parents = vec![0];
        for generation in 1..=generations {
            self.phase = Phase::Forking { generation };
            let mut children = Vec::new();
            for parent in parents {
                children.extend(self.fork(parent, width)?);
                if self.refused.is_some() {
                    break;
                }
            }
            parents = children;
            if self.refused.is_some() {
                break;
            }
        }
        self.shells.want(0);
        let rate = |ops: u64, time: Duration| ops as f64 / time.as_secs_f64().max(1e-9);
        let (then, ops) = began;
        let time = then.elapsed();
        self.forking = Some(Forking {
            clones: self.members.len() as u64 - 1,
            time_s: time.as_secs_f64(),
            root_ops_per_s_before: before,
            root_ops_per_s_meanwhile: rate(self.ops_of_root().saturating_sub(ops), time),
        });
        Ok(())
    }

    fn ops_of_root(&self) -> u64 {
        self.members[0].as_ref().map_or(0, Member::ops)
    }

    /// Waits until the root follows the formula and has run for as long as it is to by itself. Says how many
    /// operations a second it does.
    fn warm_up(&mut self) -> Result<f64, End> {
        while self.boot.is_none() {
            self.tick()?;
            self.latch()?;
            if self.boot.is_none() && self.started.elapsed() > PATIENCE {
                return Err(End::failed(format!(
                    "the guest has not begun to write memory after {} s",
                    PATIENCE.as_secs()
                )));
            }
            thread::sleep(LOOK);
        }
        // How fast it is shows in the second half.
        let half = self.config.warm_up / 2;
        self.run_for(half)?;
        let (then, ops) = (Instant::now(), self.ops_of_root());
        self.run_for(self.config.warm_up - half)?;
        let done = self.ops_of_root().saturating_sub(ops);
        Ok(done as f64 / then.elapsed().as_secs_f64().max(1e-9))
    }

    fn run_for(&mut self, time: Duration) -> Result<(), End> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.tick()?;
            thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }

    /// Looks whether the root says that it follows the formula.
    fn latch(&mut self) -> Result<(), End> {
        let Some(root) = &self.members[0] else {
            return Ok(());
        };
        match root.vm.latch() {
            Ok(boot) => {
                self.boot = boot.map(Arc::new);
                Ok(())
            }
            Err(error) => self.cannot_be_paused(0, &error.into()),
        }
    }

    /// Takes a snapshot of machine `parent`, and makes `width` clones of it. Says which they are: fewer, if
    /// one is refused.
    fn fork(&mut self, parent: usize, width: u64) -> Result<Vec<usize>, End> {
        let pages = self.config.guest.memory / PAGE_SIZE;
        let promise = match self.shells.frames().pool().try_promise(pages) {
            Ok(promise) => promise,
            Err(error) => {
                self.refuse(&self.no_promise(&error));
                return Ok(Vec::new());
            }
        };
        let Some(origin) = self.snapshot(parent)? else {
            return Ok(Vec::new());
        };
        self.origins.push((Arc::clone(&origin), promise));
        let mut clones = Vec::new();
        for _ in 0..width {
            self.tick()?;
            if self.members[parent].is_none() {
                break;
            }
            if let Err(why) = self.make_clone(parent, &origin) {
                self.refuse(&why);
                break;
            }
            clones.push(self.members.len() - 1);
        }
        Ok(clones)
    }

    /// Why there is no memory for the next clone, and what to do.
    fn no_promise(&self, error: &PromiseError) -> String {
        let what = match self.config.quota {
            None => "--quota",
            Some(_) => "a smaller --quota",
        };
        format!("{} ({what} makes room for more clones)", chain(error))
    }

    /// The next clone cannot be made. The others go on, but not all was done that was asked for.
    fn refuse(&mut self, why: &str) {
        let why = format!("clone {} was refused: {why}", self.members.len());
        self.observer.note(&why);
        self.errors.push(why.clone());
        self.refused = Some(why);
    }

    /// Makes a clone of machine `parent` from `origin`.
    fn make_clone(&mut self, parent: usize, origin: &Arc<RunSnapshot>) -> Result<(), String> {
        let Some(of) = &self.members[parent] else {
            return Err("its parent is gone".to_owned());
        };
        let guest = &self.config.guest;
        let pool = self.shells.frames().pool();
        // What it may write is spoken for before it is there, and it has no more.
        let promise = pool.try_promise(self.config.promised() / PAGE_SIZE);
        let promise = promise.map_err(|error| self.no_promise(&error))?;
        let account = pool.open_account(Some(self.config.limit() / PAGE_SIZE));
        let began = Instant::now();
        let shell = self.shells.take().map_err(|error| chain(&error))?;
        let (sender, inbox) = events();
        let mut vm = of
            .vm
            .clone_of(origin, shell, guest, account, sender)
            .map_err(|error| chain(&error))?;
        let running = vm
            .start_from(origin, guest)
            .map_err(|error| chain(&error))?;
        self.incarnations.push(Arc::clone(&vm.incarnation));
        let first = running.saturating_duration_since(began);
        let place = (parent, of.depth);
        let clone = Member::clone_of(place, vm, inbox, origin, promise, first);
        self.first_instruction
            .saturating_record(first.as_nanos() as u64);
        self.members.push(Some(clone));
        Ok(())
    }
}
