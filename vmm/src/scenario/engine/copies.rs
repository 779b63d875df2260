//! Pages that were copied.

use std::collections::BTreeMap;

use super::super::performer::{PAGES, Page, Who};
use super::super::script::Step;
use super::Play;

impl Play<'_> {
    /// Counts the pages that are in another frame than before: each is a copy,
    /// unless the step moved it there.
    pub(super) fn note_frames(&mut self, step: Option<&Step>) {
        let mut frames = BTreeMap::new();
        for who in self.alive.clone() {
            for page in 0..PAGES {
                let Some(view) = self.performer.view(who, page) else {
                    self.copies = None;
                    return;
                };
                frames.insert((who, page), view.frame);
            }
        }
        let moved = |at: &(Who, Page)| match step {
            Some(Step::Migrate(who, page)) => *at == (*who, *page),
            // The kernel's moves all of it. Ours moves nothing.
            Some(Step::Collapse(who, _)) => at.0 == *who,
            Some(Step::Merge(one, other)) => at == one || at == other,
            _ => false,
        };
        let mut copied = 0;
        for (at, &frame) in &frames {
            let before = match self.frames.get(at) {
                Some(&before) => before,
                // A child's page that is not in its parent's frame was copied by the fork.
                None => self
                    .parents
                    .get(&at.0)
                    .and_then(|&parent| frames.get(&(parent, at.1)))
                    .copied()
                    .flatten(),
            };
            let differs = matches!((before, frame), (Some(a), Some(b)) if a != b);
            copied += u64::from(differs && !moved(at));
        }
        if let Some(copies) = &mut self.copies {
            *copies += copied;
        }
        self.frames = frames;
    }
}
