from .postgres import Postgres
def test_it(postgres: Postgres) -> None:
    print(postgres.new_database(), postgres.execute("select 1"))
    import subprocess, sys
    print(subprocess.run([sys.executable, "/tmp/storages/try1.py", postgres.new_database()], capture_output=True, text=True))
