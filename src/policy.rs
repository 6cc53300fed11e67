//! What becomes of a tagged span, as data: which relation it has to what is stored, and what is done then.

use crate::error::BuildError;

/// How a tagged span stands to the context that is stored for its instance.
///
/// A span falls into the first row that fits, read from the top; [`Continuation`] says what is done.
///
/// | relation | when | by default |
/// |---|---|---|
/// | `Late` | the id was recorded when the span had already started | [`Link`](Continuation::Link) |
/// | `Child` | nothing is stored, but its `workflow.parent_instance_id` is, in another trace than the natural parent's | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `SameTrace` | the natural parent is in the stored trace | [`Keep`](Continuation::Keep) |
/// | `NewRun` | what is stored belongs to another `workflow.run_id` | [`NewRootAndLink`](Continuation::NewRootAndLink) |
/// | `Expired` | the stored trace is past `max_age` or `max_spans` | [`NewRootAndLink`](Continuation::NewRootAndLink) |
/// | `Resumed` | the stored context came from another process, or was made by [`create_resumed`](crate::WorkflowContextStorage::create_resumed) | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `Foreign` | the natural parent is in another trace: a poller, an HTTP request | [`ParentAndLink`](Continuation::ParentAndLink) |
/// | `Orphan` | there is no natural parent | [`Parent`](Continuation::Parent) |
///
/// The first span of an instance has no relation: it keeps its natural parent and is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Relation {
    /// A context is stored, and the span has no natural parent.
    Orphan,
    /// The natural parent is already in the stored trace: local nesting.
    SameTrace,
    /// The natural parent is in another trace.
    Foreign,
    /// The stored context came from another process, or from `create_resumed`.
    Resumed,
    /// The first span of a child workflow, whose parent instance is stored.
    Child,
    /// The first span of another run of a known instance.
    NewRun,
    /// The id was recorded after the span had started, when its parent could no longer change.
    Late,
    /// The stored trace has reached `max_age` or `max_spans`.
    Expired,
}

/// What is done with a span of some [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Continuation {
    /// The natural parent, and nothing else.
    Keep,
    /// The stored context becomes the parent.
    Parent,
    /// The natural parent, and a link to the stored context.
    Link,
    /// The stored context becomes the parent, with a link to the natural parent if there is one.
    ParentAndLink,
    /// No parent: a new trace.
    NewRoot,
    /// No parent, and a link to the stored context.
    NewRootAndLink,
}

impl Continuation {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Keep => "kept its natural parent",
            Self::Parent => "child of what is stored",
            Self::Link => "kept its natural parent, linked to what is stored",
            Self::ParentAndLink => "child of what is stored, linked to its natural parent",
            Self::NewRoot => "a new root",
            Self::NewRootAndLink => "a new root, linked to what was stored",
        }
    }
}

impl Relation {
    const COUNT: usize = 8;

    /// The value of the attribute `workflow.relation` that every link of this crate carries.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Orphan => "orphan",
            Self::SameTrace => "same_trace",
            Self::Foreign => "foreign",
            Self::Resumed => "resumed",
            Self::Child => "child",
            Self::NewRun => "new_run",
            Self::Late => "late",
            Self::Expired => "expired",
        }
    }
}

/// The continuation of each relation, and which relations take a fresh sampling decision.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    continuations: [Continuation; Relation::COUNT],
    resampled: [bool; Relation::COUNT],
}

impl Default for Policy {
    fn default() -> Self {
        let mut continuations = [Continuation::ParentAndLink; Relation::COUNT];
        continuations[Relation::Orphan as usize] = Continuation::Parent;
        continuations[Relation::SameTrace as usize] = Continuation::Keep;
        continuations[Relation::NewRun as usize] = Continuation::NewRootAndLink;
        continuations[Relation::Late as usize] = Continuation::Link;
        continuations[Relation::Expired as usize] = Continuation::NewRootAndLink;
        Self {
            continuations,
            resampled: [false; Relation::COUNT],
        }
    }
}

impl Policy {
    pub(crate) fn of(&self, relation: Relation) -> Continuation {
        self.continuations[relation as usize]
    }

    pub(crate) fn set(&mut self, relation: Relation, continuation: Continuation) {
        self.continuations[relation as usize] = continuation;
    }

    pub(crate) fn resample(&mut self, relation: Relation) {
        self.resampled[relation as usize] = true;
    }

    /// Whether spans of this relation leave the stored trace so that the sampler decides anew.
    pub(crate) fn resamples(&self, relation: Relation) -> bool {
        self.resampled[relation as usize]
    }

    /// The continuation where the stored context has that sampled flag.
    ///
    /// A new root asks the sampler anew. Where the trace was not sampled and no new decision is wanted, the span
    /// stays in it: nothing is exported, so nothing grows.
    pub(crate) fn continuation(&self, relation: Relation, sampled: bool) -> Continuation {
        let new_root = |c| matches!(c, Continuation::NewRoot | Continuation::NewRootAndLink);
        match self.of(relation) {
            continuation if self.resamples(relation) && !new_root(continuation) => {
                Continuation::NewRootAndLink
            }
            continuation if !sampled && !self.resamples(relation) && new_root(continuation) => {
                Continuation::Parent
            }
            continuation => continuation,
        }
    }

    pub(crate) fn check(&self) -> Result<(), BuildError> {
        let late = self.of(Relation::Late);
        if !matches!(late, Continuation::Keep | Continuation::Link) {
            return Err(BuildError::ImpossibleRelation {
                relation: Relation::Late,
                continuation: late,
                why: "the parent of a span that has started can no longer change, only Keep and Link are left",
            });
        }
        let within_a_trace = [
            Relation::Orphan,
            Relation::SameTrace,
            Relation::Foreign,
            Relation::Child,
            Relation::Late,
        ];
        match within_a_trace
            .into_iter()
            .find(|relation| self.resamples(*relation))
        {
            Some(relation) => Err(BuildError::ImpossibleResampling { relation }),
            None => Ok(()),
        }
    }
}
