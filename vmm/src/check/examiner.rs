//! Examines snapshots: once when they are new (*cut*), once before they are dropped (*isolation*).
//!
//! A frame that two snapshots share is the same memory: it is read when it first appears in a snapshot and
//! when it is last seen in one, and not in between. So a look costs what was written since the one before,
//! not what there is, and still every page of every snapshot is compared bit for bit at both ends of the
//! snapshot's life.

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::Arc;

use guest::abi::{FOLLOWS_FORMULA, Layout, PAGE_SIZE, Pattern, VcpuPage, mark_offset};
use guest::formula::last_mark;

use super::boot::Boot;
use super::hammer::{At, Hammered};
use super::hashes::{self, Hashes};
use super::identity::{Found, Identities, Observation};
use super::registers::Registers;
use super::rings;
use super::tracking::{Tracked, UnreportedDirty};
use super::view::View;
use super::violation::{Oracle, Violation};
use crate::incarnation::Incarnation;
use crate::run_snapshot::RunSnapshot;
use palimpsest::aside::Aside;
use palimpsest::host::PhysMap;
use palimpsest::mm::{BringError, FramePool, Toucher};

/// After this many violations in one look at one snapshot the rest of that look is not reported.
const ENOUGH: usize = 16;

/// What a new snapshot is compared with.
#[derive(Debug, Default)]
pub struct Look {
    /// What is known of the guest since it booted, if it follows the formula.
    pub boot: Option<Arc<Boot>>,
    /// The snapshot the VM ran on from, if it lives.
    pub parent: Option<Arc<RunSnapshot>>,
    /// What dirty tracking has reported, if it was asked.
    pub tracked: Option<Tracked>,
}

/// Knows a guest, and what was found out about its living snapshots.
#[derive(Debug)]
pub struct Examiner {
    seed: u64,
    layout: Layout,
    hammered: Hammered,
    physmap: Arc<PhysMap>,
    pool: Arc<FramePool>,
    aside: Option<Arc<Aside>>,
    known: HashMap<u64, Known>,
    identities: Identities,
}

/// What the first look at a snapshot found out.
#[derive(Debug)]
struct Known {
    /// Operations of each vCPU, if the guest follows the formula.
    ops: Option<Vec<u64>>,
    hashes: Hashes,
}

/// What a look found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Pages that were read and compared.
    pub pages: u64,
    /// Random numbers that were compared.
    pub draws: u64,
    /// What was wrong.
    pub violations: Vec<Violation>,
}

impl Findings {
    fn reporter(violations: &mut Vec<Violation>) -> impl FnMut(Violation) {
        |violation| {
            if violations.len() < ENOUGH {
                violations.push(violation);
            }
        }
    }
}

impl Examiner {
    /// An examiner for a guest of this layout.
    pub fn new(
        seed: u64,
        pattern: Pattern,
        layout: Layout,
        physmap: Arc<PhysMap>,
        pool: Arc<FramePool>,
    ) -> Self {
        Self {
            seed,
            layout,
            hammered: Hammered::new(seed, pattern, layout),
            physmap,
            pool,
            aside: None,
            known: HashMap::new(),
            identities: Identities::default(),
        }
    }

    /// The same, stepping aside for a guest whose vCPUs are stopped and started.
    #[must_use]
    pub fn stepping_aside(self, aside: Arc<Aside>) -> Self {
        Self {
            aside: Some(aside),
            ..self
        }
    }

    /// Has all of a snapshot's memory there, if it is read as it is used: what is looked at is there for good then.
    ///
    /// # Errors
    /// If some of it cannot be had.
    pub fn bring(&self, snapshot: &RunSnapshot) -> Result<(), BringError> {
        let regions = snapshot.memory().backed_regions();
        regions.iter().try_for_each(|region| {
            self.aside.iter().for_each(|aside| aside.pass());
            regions.bring(region, Toucher::Reader)
        })
    }

    /// Checks that `snapshot` is the state at one instant, and that all that differs from the snapshot before
    /// was reported as dirty.
    pub fn first_look(&mut self, snapshot: &RunSnapshot, look: &Look) -> Findings {
        let view = self.view(snapshot);
        let boot = look.boot.as_deref();
        let parent = look.parent.as_deref();
        let parent = parent.and_then(|p| Some((self.view(p), self.known.get(&p.number())?)));
        let mut findings = Findings::default();
        // By the registers.
        let ops: Option<Vec<u64>> =
            boot.map(|_| snapshot.vcpus().iter().map(|v| v.mm7()).collect());
        if let Some(ops) = &ops {
            let mut report = Findings::reporter(&mut findings.violations);
            let now = At { view, ops };
            self.check_counters(now, &mut report);
            self.check_marks(now, &mut report);
            let parent = parent.as_ref().and_then(|(view, known)| {
                Some(At {
                    view: *view,
                    ops: known.ops.as_ref()?,
                })
            });
            if let Some(parent) = parent {
                self.check_counters_differ(parent, now, &mut report);
            }
            findings.pages += self.hammered.first_look(now, parent, &mut report);
            for (device, state) in (0..).zip(snapshot.devices()) {
                findings.pages +=
                    rings::check(view, &self.layout, self.seed, device, state, &mut report);
            }
        }
        let end = match ops {
            Some(_) => self.layout.hammer_base,
            None => self.layout.memory,
        };
        // Of a parent that was compared by the formula the hashes are of fewer pages.
        let parent_hashes = parent
            .filter(|(_, known)| known.ops.is_none() || ops.is_some())
            .map(|(view, known)| (view, &known.hashes));
        let (hashes, pages) = hashes::first_look(view, 0..end / PAGE_SIZE, parent_hashes);
        findings.pages += pages;
        if let Some(boot) = boot {
            let mut report = Findings::reporter(&mut findings.violations);
            boot.pages.check(snapshot.number(), &hashes, &mut report);
            self.check_registers(snapshot, boot, &mut report);
        }
        let drawn = boot.zip(ops.as_ref()).zip(snapshot.incarnation());
        let drawn = drawn.map(|((boot, ops), incarnation)| {
            let found = Found::read(&self.layout, |gpa| view.u64(gpa));
            let ops = ops.iter().map(|&ops| ops..=ops);
            (incarnation, boot.draws(Some(snapshot.number()), found, ops))
        });
        if let Some((incarnation, observation)) = drawn {
            let drawn = self.look_at_draws(incarnation, &observation);
            findings.draws += drawn.draws;
            findings.violations.extend(drawn.violations);
        }
        let now = Known { ops, hashes };
        if let Some(tracked) = &look.tracked {
            let mut report = Findings::reporter(&mut findings.violations);
            self.check_tracking(snapshot.number(), &now, tracked, &mut report);
        }
        self.known.insert(snapshot.number(), now);
        findings
    }

    /// Checks what `incarnation` has drawn by now. What it had drawn earlier was looked at before.
    pub fn look_at_draws(&mut self, incarnation: &Arc<Incarnation>, now: &Observation) -> Findings {
        let mut findings = Findings::default();
        let mut report = Findings::reporter(&mut findings.violations);
        let draws = self.identities.look(incarnation, now, &mut report);
        drop(report);
        Findings { draws, ..findings }
    }

    /// Checks that `snapshot` has not changed since its first look. `heir` is a younger snapshot whose parent
    /// it is, and which will have its last look, too.
    pub fn last_look(&mut self, snapshot: &RunSnapshot, heir: Option<&RunSnapshot>) -> Findings {
        let mut findings = Findings::default();
        let Some(known) = self.known.remove(&snapshot.number()) else {
            return findings;
        };
        let view = self.view(snapshot);
        let heir = heir
            .filter(|h| h.parent() == Some(snapshot.number()))
            .and_then(|h| Some((self.view(h), self.known.get(&h.number())?)))
            // Both must be compared by the same rule.
            .filter(|(_, heirs)| heirs.ops.is_some() == known.ops.is_some());
        let mut report = Findings::reporter(&mut findings.violations);
        if let Some(ops) = &known.ops {
            let heir = heir.as_ref().and_then(|(view, known)| {
                Some(At {
                    view: *view,
                    ops: known.ops.as_ref()?,
                })
            });
            findings.pages += self.hammered.last_look(At { view, ops }, heir, &mut report);
        }
        let heir = heir.map(|(view, _)| view);
        findings.pages += hashes::last_look(view, &known.hashes, heir, &mut report);
        drop(report);
        findings
    }

    fn check_tracking(
        &self,
        snapshot: u64,
        now: &Known,
        tracked: &Tracked,
        report: &mut dyn FnMut(Violation),
    ) {
        let since = tracked.since.number();
        let Some(before) = self.known.get(&since) else {
            return;
        };
        let unreported = UnreportedDirty {
            reported: &tracked.reported,
            since,
            snapshot,
        };
        match (&before.ops, &now.ops) {
            (Some(before), Some(now)) => {
                unreported.among(self.hammered.between(before, now), report);
            }
            (None, None) => {}
            // The guest began to follow the formula in between: hashes are of other pages since.
            _ => return,
        }
        unreported.hashed(&before.hashes, &now.hashes, report);
    }

    fn view<'a>(&'a self, snapshot: &'a RunSnapshot) -> View<'a> {
        View::new(
            snapshot.number(),
            snapshot.memory(),
            &self.physmap,
            &self.pool,
        )
        .stepping_aside(self.aside.as_deref())
    }

    fn check_registers(
        &self,
        snapshot: &RunSnapshot,
        boot: &Boot,
        report: &mut dyn FnMut(Violation),
    ) {
        let vcpus = boot.registers.iter().zip(&boot.vcpus);
        for ((vcpu, state), (boot, &declared)) in (0..).zip(snapshot.vcpus()).zip(vcpus) {
            Registers {
                snapshot: snapshot.number(),
                seed: self.seed,
                vcpu,
                state,
                boot,
                declared,
            }
            .check(report);
        }
    }

    /// vCPUs leave marks in each other's pages: all of them were captured at one instant if no mark is of an
    /// operation that its vCPU has not done yet, and none is missing.
    fn check_marks(&self, At { view, ops }: At<'_>, report: &mut dyn FnMut(Violation)) {
        let vcpus = self.layout.vcpus;
        for (from, &done) in (0..).zip(ops) {
            for to in (0..vcpus).filter(|&to| to != from) {
                let gpa = self.layout.vcpu_page(to) + mark_offset(from);
                let found = view.u64(gpa);
                let mark = |ops| last_mark(vcpus, from, to, ops);
                // It is left after the operation is counted in the registers.
                if found == mark(done) || found == mark(done.saturating_sub(1)) {
                    continue;
                }
                let mut v = Violation::new(
                    Oracle::Cut,
                    match found > done {
                        true => format!(
                            "vcpu {to} has a mark that vcpu {from} is to leave only later: \
                             they are not of the same instant"
                        ),
                        false => format!(
                            "vcpu {to} misses a mark that vcpu {from} has left: \
                             they are not of the same instant"
                        ),
                    },
                );
                v.snapshot = Some(view.number);
                v.gpa = Some(gpa);
                v.expected = format!("{} (vcpu {from} has done {done} operations)", mark(done));
                v.found = found.to_string();
                v.last_writer = format!("vcpu {from}");
                v.frame = view.describe_frame(gpa / PAGE_SIZE);
                report(v);
            }
        }
    }

    /// The counter in memory is that of the registers, or one behind: it is written last. And the page says
    /// still that the guest follows the formula.
    fn check_counters(&self, At { view, ops }: At<'_>, report: &mut dyn FnMut(Violation)) {
        for (vcpu, &done) in (0..).zip(ops) {
            let gpa = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, ops) as u64;
            let declared = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, formula) as u64;
            if view.u64(declared) != FOLLOWS_FORMULA {
                let mut v = Violation::new(
                    Oracle::Cut,
                    format!("the page of vcpu {vcpu} has lost what it has said of itself"),
                );
                v.snapshot = Some(view.number);
                v.gpa = Some(declared);
                v.expected = format!("{FOLLOWS_FORMULA:#018x} (since boot)");
                v.found = format!("{:#018x}", view.u64(declared));
                v.frame = view.describe_frame(declared / PAGE_SIZE);
                report(v);
            }
            let counted = view.u64(gpa);
            if counted != done && counted.wrapping_add(1) != done {
                let mut v = Violation::new(
                    Oracle::Cut,
                    format!("memory and registers of vcpu {vcpu} are not of the same instant"),
                );
                v.snapshot = Some(view.number);
                v.gpa = Some(gpa);
                v.expected = format!("{done} operations (by the registers)");
                v.found = format!("{counted} operations (in memory)");
                v.frame = view.describe_frame(gpa / PAGE_SIZE);
                report(v);
            }
        }
    }

    /// Each operation changes the page that it is counted in: two snapshots with an operation in between
    /// cannot share it.
    fn check_counters_differ(
        &self,
        parent: At<'_>,
        now: At<'_>,
        report: &mut dyn FnMut(Violation),
    ) {
        for (vcpu, (&before, &done)) in (0..).zip(parent.ops.iter().zip(now.ops)) {
            let gpa = self.layout.vcpu_page(vcpu) + offset_of!(VcpuPage, ops) as u64;
            let gfn = gpa / PAGE_SIZE;
            // One operation may have been counted in the registers alone, and in memory after.
            let is_counted = before.saturating_add(2) <= done;
            if is_counted && parent.view.frame(gfn) == now.view.frame(gfn) {
                let mut v = Violation::new(
                    Oracle::Isolation,
                    "a page was written after the snapshot was taken",
                );
                v.snapshot = Some(parent.view.number);
                v.gpa = Some(gpa);
                v.expected = format!("{before} operations, or one less");
                v.found = format!(
                    "{} operations, in a frame that snapshot {} shares, with {done}",
                    parent.view.u64(gpa),
                    now.view.number
                );
                v.last_writer = format!("vcpu {vcpu}");
                v.frame = parent.view.describe_frame(gfn);
                report(v);
            }
        }
    }
}
