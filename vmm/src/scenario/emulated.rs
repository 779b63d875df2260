//! Our own `mm` as a performer, under any policy and on any stage.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::performer::{Hold, HoldId, NotDone, PAGES, Page, PageView, Performer, Who};
use super::stage::{Actor, Stage, StageError};
use palimpsest::causes::chain;
use palimpsest::mm::{
    Access, AddressSpace, AnyPolicy, Exclusive, Frozen, Get, Gfn, Mmu, MmuError, Pfn, Pin,
    Protection,
};

/// Address spaces under one policy, on a stage. Fields are in the order they must be dropped in.
pub struct Emulated<S: Stage> {
    policy: Box<dyn Fn() -> AnyPolicy>,
    actors: BTreeMap<Who, S::Actor>,
    snapshot: Option<Arc<Frozen>>,
    holds: BTreeMap<HoldId, Held>,
    hogs: Vec<AddressSpace<Exclusive>>,
    refusal: Arc<Refusal>,
    stage: S,
}

enum Held {
    Get(Get),
    Pin(Pin),
}

impl Held {
    fn frame(&self) -> Pfn {
        match self {
            Self::Get(get) => get.pfn(),
            Self::Pin(pin) => pin.pfn(),
        }
    }
}

impl<S: Stage> Emulated<S> {
    /// P on `stage`, with untouched memory; `policy` makes one policy for each address space.
    ///
    /// # Errors
    /// If the stage has no room for it.
    pub fn new(stage: S, policy: Box<dyn Fn() -> AnyPolicy>) -> Result<Self, StageError> {
        let refusal = Arc::new(Refusal::default());
        let parent = stage.parent(policy(), &|mmu| refusal.watch(mmu))?;
        Ok(Self {
            policy,
            actors: BTreeMap::from([(Who::P, parent)]),
            snapshot: None,
            holds: BTreeMap::new(),
            hogs: Vec::new(),
            refusal,
            stage,
        })
    }

    fn actor(&self, who: Who) -> Result<&S::Actor, NotDone> {
        let actor = self.actors.get(&who);
        actor.ok_or_else(|| NotDone::Failed(format!("{who:?} does not run")))
    }

    fn frozen(&self) -> Result<&Arc<Frozen>, NotDone> {
        let there = self.snapshot.as_ref();
        there.ok_or_else(|| NotDone::Failed("there is no snapshot".to_owned()))
    }

    fn held(&self, id: HoldId) -> Result<&Held, NotDone> {
        let held = self.holds.get(&id);
        held.ok_or_else(|| NotDone::Failed(format!("there is no hold {id}")))
    }
}

fn refused(error: impl std::error::Error) -> NotDone {
    NotDone::Refused(chain(&error))
}

fn refused_stage(error: StageError) -> NotDone {
    NotDone::Refused(chain(&*error))
}

impl<S: Stage> Performer for Emulated<S> {
    fn write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone> {
        let actor = self.actor(who)?;
        actor.cpu_write(page, value).map_err(refused_stage)
    }

    fn read(&mut self, who: Who, page: Page) -> Result<u64, NotDone> {
        if who == Who::S {
            let frozen = self.frozen()?;
            return frozen
                .with_frame(self.stage.gfn(page), |frame| self.stage.load(frame))
                .map_err(refused);
        }
        self.actor(who)?.cpu_read(page).map_err(refused_stage)
    }

    fn fork(&mut self, parent: Who, child: Who) -> Result<(), NotDone> {
        if !child.runs() || self.actors.contains_key(&child) {
            return Err(NotDone::Failed(format!("{child:?} is no name for a child")));
        }
        let frozen = if parent.runs() {
            self.actor(parent)?.space().fork().map_err(refused)?
        } else {
            Arc::clone(self.frozen()?)
        };
        let policy = (self.policy)();
        let actor = self
            .stage
            .child(&frozen, policy, &|mmu| self.refusal.watch(mmu))
            .map_err(refused_stage)?;
        self.actors.insert(child, actor);
        Ok(())
    }

    fn snapshot(&mut self, who: Who) -> Result<(), NotDone> {
        if self.snapshot.is_some() {
            return Err(NotDone::Failed("there is a snapshot already".to_owned()));
        }
        self.snapshot = Some(self.actor(who)?.space().fork().map_err(refused)?);
        Ok(())
    }

    fn restore(&mut self, who: Who) -> Result<(), NotDone> {
        let frozen = self.frozen()?;
        let space = self.actor(who)?.space();
        space.restore(frozen).map_err(refused)
    }

    fn exit(&mut self, who: Who) -> Result<(), NotDone> {
        if who.runs() {
            self.actor(who)?;
            self.actors.remove(&who);
        } else {
            self.frozen()?;
            self.snapshot = None;
        }
        Ok(())
    }

    fn take(&mut self, id: HoldId, who: Who, page: Page, hold: Hold) -> Result<(), NotDone> {
        let held = if who == Who::S {
            let gfn = self.stage.gfn(page);
            Held::Get(self.frozen()?.get(gfn).map_err(refused)?)
        } else {
            let (space, gfn) = (self.actor(who)?.space(), self.stage.gfn(page));
            match hold {
                Hold::GetRead => Held::Get(space.get(gfn, Access::Read).map_err(refused)?),
                Hold::GetWrite => Held::Get(space.get(gfn, Access::Write).map_err(refused)?),
                Hold::PinRead => Held::Pin(space.pin(gfn, Access::Read).map_err(refused)?),
                Hold::PinWrite => Held::Pin(space.pin(gfn, Access::Write).map_err(refused)?),
            }
        };
        self.holds.insert(id, held);
        Ok(())
    }

    fn read_hold(&mut self, id: HoldId) -> Result<u64, NotDone> {
        Ok(self.stage.load(self.held(id)?.frame()))
    }

    fn write_hold(&mut self, id: HoldId, value: u64) -> Result<(), NotDone> {
        self.stage.store(self.held(id)?.frame(), value);
        Ok(())
    }

    fn release(&mut self, id: HoldId) -> Result<(), NotDone> {
        self.held(id)?;
        self.holds.remove(&id);
        Ok(())
    }

    fn protect(&mut self, who: Who) -> Result<(), NotDone> {
        let space = self.actor(who)?.space();
        space.take_dirty().map(drop).map_err(refused)
    }

    fn discard(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        let space = self.actor(who)?.space();
        let discarded = space.discard(self.stage.gfn(page), 1);
        discarded.map(drop).map_err(refused)
    }

    fn discard_rest(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        let (space, Gfn(kept)) = (self.actor(who)?.space(), self.stage.gfn(page));
        let behind = kept + 1;
        space.discard(Gfn(0), kept).map_err(refused)?;
        space
            .discard(Gfn(behind), space.pages() - behind)
            .map(drop)
            .map_err(refused)
    }

    /// A write fault on the page that takes all of its region with it: the one thing that
    /// makes regions huge again.
    fn collapse(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        let (space, gfn) = (self.actor(who)?.space(), self.stage.gfn(page));
        space.set_whole_price(0);
        let resolved = space.write_fault(gfn);
        space.set_whole_price(u32::MAX);
        resolved.map_err(refused)?;
        if space.entry(gfn).map_err(refused)?.is_huge() {
            Ok(())
        } else {
            Err(NotDone::Refused(
                "some page is not at home and exclusive".to_owned(),
            ))
        }
    }

    fn migrate(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        let space = self.actor(who)?.space();
        let migrated = space.migrate(self.stage.gfn(page));
        migrated.map(drop).map_err(refused)
    }

    fn merge(&mut self, one: (Who, Page), other: (Who, Page)) -> Result<(), NotDone> {
        let (a, b) = (self.actor(one.0)?, self.actor(other.0)?);
        let gfn = |page| self.stage.gfn(page);
        a.space()
            .merge(gfn(one.1), b.space(), gfn(other.1))
            .map_err(refused)
    }

    fn force_write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone> {
        let space = self.actor(who)?.space();
        space
            .force_write(self.stage.gfn(page), 0, &value.to_le_bytes())
            .map_err(refused)
    }

    /// Fills two address spaces of somebody else's: one takes all that was never used, its
    /// copy all that was given back.
    fn exhaust_memory(&mut self) -> Result<(), NotDone> {
        let pool = self.stage.pool();
        let pages = pool.usage().limit;
        let fill = |space: &AddressSpace<Exclusive>| {
            let writes = (0..pages).map(|n| space.write_fault(Gfn(n)));
            writes.take_while(Result::is_ok).count();
        };
        let failed = |error: &dyn std::error::Error| NotDone::Failed(chain(error));
        let hog = AddressSpace::new(Arc::clone(pool), Exclusive, Box::new(NoMmu), pages)
            .map_err(|e| failed(&e))?;
        fill(&hog);
        let frozen = hog.fork().map_err(|e| failed(&e))?;
        let copy = AddressSpace::from_frozen(&frozen, Exclusive, Box::new(NoMmu))
            .map_err(|e| failed(&e))?;
        drop(frozen);
        fill(&copy);
        self.hogs = vec![hog, copy];
        Ok(())
    }

    fn free_memory(&mut self) -> Result<(), NotDone> {
        self.hogs.clear();
        Ok(())
    }

    fn refuse_mmu(&mut self, after: u64) -> Result<(), NotDone> {
        self.refusal.refuse(after);
        Ok(())
    }

    fn view(&mut self, who: Who, page: Page) -> Option<PageView> {
        let pool = Arc::clone(self.stage.pool());
        let gfn = self.stage.gfn(page);
        let entry = match who {
            Who::S => self.frozen().ok()?.entry(gfn).ok()?,
            _ => self.actor(who).ok()?.space().entry(gfn).ok()?,
        };
        debug_assert!(page < PAGES);
        Some(PageView {
            frame: entry.is_present().then(|| entry.pfn()),
            inside: Some((entry, pool.state(entry.pfn()))),
        })
    }
}

/// Refuses one change of page tables, some time from now.
#[derive(Debug)]
struct Refusal {
    /// Changes that are granted before one is refused; `u64::MAX` refuses none.
    granted: AtomicU64,
}

impl Default for Refusal {
    fn default() -> Self {
        Self {
            granted: AtomicU64::new(u64::MAX),
        }
    }
}

impl Refusal {
    fn refuse(&self, after: u64) {
        self.granted.store(after, Ordering::Relaxed);
    }

    fn watch(self: &Arc<Self>, mmu: Box<dyn Mmu>) -> Box<dyn Mmu> {
        Box::new(Refusing {
            mmu,
            refusal: Arc::clone(self),
        })
    }

    fn check(&self, what: &'static str, first: Gfn, count: u64) -> Result<(), MmuError> {
        let granted = self.granted.load(Ordering::Relaxed);
        // At zero this one is refused, and all that follow are granted.
        let next = if granted == u64::MAX {
            granted
        } else {
            granted.wrapping_sub(1)
        };
        self.granted.store(next, Ordering::Relaxed);
        if granted == 0 {
            return Err(MmuError::Host {
                what,
                first,
                count,
                source: std::io::ErrorKind::OutOfMemory.into(),
            });
        }
        Ok(())
    }
}

struct Refusing {
    mmu: Box<dyn Mmu>,
    refusal: Arc<Refusal>,
}

impl Mmu for Refusing {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.refusal.check("map", first, count)?;
        self.mmu.map(first, frame, count, protection)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.refusal.check("protect", first, count)?;
        self.mmu.protect(first, count, protection)
    }

    fn is_crowded(&self) -> bool {
        self.mmu.is_crowded()
    }
}

/// The MMU of an address space in which no CPU runs.
struct NoMmu;

impl Mmu for NoMmu {
    fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }

    fn protect(&self, _: Gfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
}
