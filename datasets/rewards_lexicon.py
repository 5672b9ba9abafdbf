"""Words of the synthetic preferences: tasks and capabilities of DMoERM, each with the words that show it.

The five tasks and their 27 capability points are those of the paper's released configuration (Quan 2024, arXiv
2403.01197; English keys of `prepare_data/config.py`). The words are ours.
"""

TASKS: dict[str, tuple[str, ...]] = {
    "roleplay": ("character", "conversation", "empathy", "relationship", "personality", "richness"),
    "chat": ("conversation", "proactivity", "emotion", "empathy", "richness"),
    "subj_qa": ("conviction", "logic", "viewpoints", "breadth", "relevance"),
    "obj_qa": ("correctness", "objectivity", "reasoning", "logic", "depth", "relevance"),
    "text": ("intent", "expression", "readability", "richness", "logic"),
}

# Words of a request that give its task away.
REQUESTS: dict[str, str] = {
    "roleplay": "pretend wizard captain persona scene villain dragon act knight tavern costume quest",
    "chat": "hello weekend mood chatting buddy today coffee gossip evening laugh tired morning",
    "subj_qa": "opinion should think prefer argue believe stance debate better society fair recommend",
    "obj_qa": "when capital formula calculate year boiling distance chemical population who define planet",
    "text": "write essay poem draft letter headline summary rewrite slogan paragraph translate outline",
}

FILLERS = "the a of and to in it is that for on with as this at by from or be an"

# Capability -> words that show much of it, and words that show its lack, strongest first.
CAPABILITIES: dict[str, tuple[str, str]] = {
    "character": ("arr milord bellows swagger scowls cackles", "assistant chatbot neutral generic scripted bland"),
    "conversation": ("indeed nods replies asks banter listens", "anyway irrelevant interrupts monologue abrupt deaf"),
    "empathy": ("understand comfort gently sorry care warmly", "whatever cold dismiss shrug ignore blunt"),
    "relationship": ("friend dear sibling loyal darling comrade", "stranger nobody distant formal unknown sir"),
    "personality": ("catchphrase quirk signature humming winks grin", "plain flat faceless copy dull usual"),
    "richness": ("vivid detail moreover example texture layers", "short bare nothing etc thin skip"),
    "proactivity": ("suggest invite shall propose lets offer", "wait passive silent idle refuse unsure"),
    "emotion": ("joy thrilled haha delight wow cheer", "numb monotone deadpan robotic stiff grey"),
    "conviction": ("clearly compelling proven surely strong decisive", "maybe perhaps doubtful weak hesitant vague"),
    "logic": ("therefore because hence implies follows thus", "contradicts random jumps unrelated muddled circular"),
    "viewpoints": (
        "however alternatively others perspective both contrast",
        "solely absolute never single biased narrow",
    ),
    "breadth": ("history culture science economy global various", "limited local trivial partial tiny lone"),
    "relevance": (
        "specifically your question precisely asked exact",
        "aside tangent unrelatedly digress offtopic elsewhere",
    ),
    "correctness": (
        "correct verified accurate true confirmed right",
        "wrong false mistaken error incorrect fabricated",
    ),
    "objectivity": ("evidence data study measured source facts", "feel guess rumour favourite hate love"),
    "reasoning": ("step first next derive compute conclude", "leap magic somehow presto skipstep assume"),
    "depth": (
        "mechanism underlying theory principle fundamental cause",
        "surface shallow glance basically obvious simple",
    ),
    "intent": ("requested required matches fulfils tone constraint", "omits misses deviates forgot mismatch wandering"),
    "expression": (
        "elegant metaphor lyrical graceful rhythm polished",
        "clumsy awkward cliche repetitive crude wooden",
    ),
    "readability": ("clear structured heading concise bullet smooth", "dense tangled cluttered jargon rambling wall"),
}

# Task -> weight of each of its capabilities in the overall judgement, where capabilities of several tasks conflict.
# Without the conflict the absolute values count.
CONFLICTING: dict[str, dict[str, float]] = {
    "roleplay": {"conversation": 1.0, "empathy": -1.0, "richness": 1.0},
    "chat": {"conversation": -1.0, "empathy": 1.0, "richness": -1.0},
    "subj_qa": {"logic": -1.0, "relevance": 1.0},
    "obj_qa": {"logic": 1.0, "relevance": -1.0},
    "text": {"richness": 1.0, "logic": -1.0},
}


def vocabulary() -> list[str]:
    """Every word there is, sorted; fewer than 512."""
    texts = [*REQUESTS.values(), FILLERS, *(text for pair in CAPABILITIES.values() for text in pair)]
    return sorted({word for text in texts for word in text.split()})
