"""placeholder until merged"""


def check_tasks(names):
    pass
