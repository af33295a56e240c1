"""Models on the tasks of EleutherAI's lm-evaluation-harness: what it asks, our engine answers.

    options             what is evaluated and how
    tasks local_data    the harness' own definitions of tasks, their data from the hub or from local files
    language_model      the harness' model class on LLM
    runs                a model on tasks -> the harness' results
    comparison          the results of two models, answer by answer
    execution           programs that a model wrote, in a process with limits, where that is asked for

The harness is an extra and slow to import, so nothing here loads it before it is needed.
"""
